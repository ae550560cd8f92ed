"""Networks of iLoRA's gate as modules of torch."""

from __future__ import annotations

import pytest

from tests.support.layouts_ilora import Networks, networks

WIDTH, EXPERTS = 48, 4


@pytest.fixture(scope="package")
def made() -> Networks:
    return networks(WIDTH, EXPERTS, seed=1)
