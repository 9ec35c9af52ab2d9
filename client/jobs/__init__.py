"""One job from the caller's side: submit it, poll it, read its result, stream its text."""
