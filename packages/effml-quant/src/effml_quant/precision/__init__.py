"""Training in low precision: which tensor has which format, and models that obey it.

scheme       one frozen description          linear       products with quantised operands, forward and backward
application  schemes on a model's modules    norms        encoded gains
switching    other schemes during a run      operations   activations, softmax, attention, residual sums
hadamard     the rotation of NVFP4's recipe
"""
