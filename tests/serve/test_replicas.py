"""Tests of several servers behind one router, which finds a session's server by the session's id."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxtml.errors import InputError
from jaxtml.serve import serving as server_command
from jaxtml.serve.serving import ServerOptions
from tests.serve.serving import serving

NGINX = Path(__file__).parents[2] / "launch" / "nginx.conf"


def test_address_that_names_a_session_is_routed_to_its_server(slots, engine):
    replica = dict(re.findall(r'"~(sess_\w\\\.)"\s+(\w);', NGINX.read_text()))
    assert set(replica.values()) == {"a", "b"}

    async def test(server):
        server.manager.prefix = server_command.session_prefix("b")
        client = await server.start()
        name = client.started["id"]
        for address in (f"/v1/live/sessions/{name}/attach", f"/v1/live/sessions{name}", f"/v1/realtime{name}"):
            assert [target for pattern, target in replica.items() if re.search(pattern, address)] == ["b"]
        client.ws._response.connection.transport.abort()
        again = await server.open(f"/v1/live/sessions?session_id={name}")
        token = client.started["resume"]["token"]
        await again.send("session.resume", session_id=name, resume_token=token, after=1)
        await again.until("session.resumed")

    serving(slots, engine, test)


@pytest.mark.parametrize("name", ["A", "a.b", "a" * 17, "a b"])
def test_replica_name_that_an_address_cannot_carry_is_refused(name, checkpoint):
    with pytest.raises(InputError, match="16 small letters and digits at most"):
        server_command.serve(ServerOptions(checkpoint, replica=name))
