"""The moment of the first training step of this process, which what is not needed for it waits for."""

import threading

first_step = threading.Event()
"""set by the training loop after its first step, or at the end of a training without one"""
