"""Servers behind one address: a session's name says whose it is, in a way that the router's configuration reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxtml.errors import InputError
from jaxtml.serve import serving as command
from jaxtml.serve.serving import ServerOptions
from tests.serve.serving import serving

NGINX = Path(__file__).parents[2] / "launch" / "nginx.conf"


def test_what_names_a_session_in_an_address_leads_to_its_server(slots, engine):
    replica = dict(re.findall(r'"~(sess_\w\\\.)"\s+(\w);', NGINX.read_text()))
    assert set(replica.values()) == {"a", "b"}

    async def test(server):
        server.manager.prefix = command.session_prefix("b")
        client = await server.start()
        name = client.started["id"]
        for address in (f"/v1/live/sessions/{name}/attach", f"/v1/live/sessions{name}", f"/v1/realtime{name}"):
            assert [to for pattern, to in replica.items() if re.search(pattern, address)] == ["b"]
        client.ws._response.connection.transport.abort()
        again = await server.open(f"/v1/live/sessions?session_id={name}")
        token = client.started["resume"]["token"]
        await again.send("session.resume", session_id=name, resume_token=token, after=1)
        await again.until("session.resumed")

    serving(slots, engine, test)


@pytest.mark.parametrize("name", ["A", "a.b", "a" * 17, "a b"])
def test_a_name_that_an_address_could_not_carry_is_refused(name, checkpoint):
    with pytest.raises(InputError, match="16 small letters and digits at most"):
        command.serve(ServerOptions(checkpoint, replica=name))
