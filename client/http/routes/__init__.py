"""The routes of `headrace serve`."""
