"""Messages out of Redis, safely: consume, validate, acknowledge."""
