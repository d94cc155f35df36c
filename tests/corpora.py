"""Where the published corpora are, each in a folder named after its source; tests of them are skipped where none is."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PLACES = (ROOT / "corpora", ROOT.parent / "shared" / "corpora")
CORPORA = Path(os.environ.get("DRAMATIS_CORPORA") or next(filter(Path.is_dir, _PLACES), _PLACES[0]))
needs_corpora = pytest.mark.skipif(
    not CORPORA.is_dir(), reason=f"no folder {CORPORA}; DRAMATIS_CORPORA names another one"
)
