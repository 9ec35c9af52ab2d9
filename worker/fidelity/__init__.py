"""`headrace validate`: measure the error of the model and of other implementations against float64."""
