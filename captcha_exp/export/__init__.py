"""A trained recognizer outside the framework: one ONNX file with preprocessing and decoding; guard and watch."""
