"""The routes of `headrace serve`, each beside the parsing of its request."""
