"""One job from the caller's side: submit, poll, read, stream."""
