"""How long tests wait for what must come."""

from __future__ import annotations

#: Seconds. What comes does so much sooner; a machine that is ten times slower than usual must not fail a test.
PATIENCE_S = 180.0
