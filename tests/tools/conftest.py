import pytest

from vlmkernels.data.images import ImageLimits
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.pool import ToolPool


@pytest.fixture
def make_pool():
    """Make a pool that is closed after the test."""
    pools = []

    def pool(tools=(), environment_factory=None, **options):
        options = {"timeout": 30.0, "max_images": 2, "limits": ImageLimits()} | options
        pools.append(ToolPool(Tools(list(tools), environment_factory), **options))
        return pools[-1]

    yield pool
    for made in pools:
        made.close()
