"""Tables as input of a batch: one reader for each format, chosen by the extension or by name."""
