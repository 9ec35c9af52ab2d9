"""The zoo's table: each directory, who builds it, and what is expected of it."""

from __future__ import annotations

from tests.zoo.entry import Entry
from tests.zoo.table_of_ends import ENDS
from tests.zoo.table_of_families import CONTAINERS, FAMILIES, REFUSALS
from tests.zoo.table_of_kinds import KINDS
from tests.zoo.table_of_tokenizers import TOKENIZERS
from tests.zoo.table_of_variants import VARIANTS

ZOO: tuple[Entry, ...] = (*VARIANTS, *TOKENIZERS, *KINDS, *ENDS, *FAMILIES, *CONTAINERS, *REFUSALS)
