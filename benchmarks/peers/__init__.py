"""Other programs that compute the same tokens on a CPU, each configured as its documentation recommends."""
