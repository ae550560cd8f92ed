"""Who may list and delete merges where no admin key is configured: whoever may ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.server.api.keys import Keys
from tests.unit.server.api.rig import Running, during


@pytest.mark.parametrize(
    ("keys", "given", "status"),
    [
        (Keys(), None, 404),
        (Keys(inference=("mine",)), None, 401),
        (Keys(inference=("mine",)), "mine", 404),
        (Keys(admin=("root",)), None, 401),
        (Keys(admin=("root",)), "root", 404),
        (Keys(inference=("mine",), admin=("root",)), "mine", 401),
        (Keys(inference=("mine",), admin=("root",)), "root", 404),
    ],
)
def test_the_admin_key_where_there_is_one(adapter: Path, keys: Keys, given: str | None, status: int) -> None:
    async def scenario(started: Running) -> None:
        started.service.keys = keys
        headers = {} if given is None else {"Authorization": f"Bearer {given}"}
        for method, path in (("GET", "/v1/adapters/nobody/merges"), ("DELETE", "/v1/adapters/nobody/merges/it")):
            response = await started.client.request(method, path, headers=headers)
            assert response.status_code == status, response.text

    during(adapter, scenario)
