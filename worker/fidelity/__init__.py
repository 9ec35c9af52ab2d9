"""`headrace validate`: the model's tensors compared with reference implementations."""
