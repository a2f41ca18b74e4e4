"""What a version of transformers itself cannot do."""

import pytest
import transformers
from packaging import version

# Its own forward of Llama 4 reads `image_outputs` of an output that has none.
LLAMA4_IS_BROKEN = version.parse(transformers.__version__).release[:2] == (5, 24)


def pytest_collection_modifyitems(items):
    for item in items:
        if LLAMA4_IS_BROKEN and "llama4" in item.name:
            item.add_marker(pytest.mark.xfail(raises=AttributeError, reason="transformers 5.24 cannot run Llama 4"))
