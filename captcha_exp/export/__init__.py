"""A trained recognizer outside the framework: one ONNX file; a guard and a watch of it."""
