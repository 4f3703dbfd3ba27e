"""Who takes part in a `bench`: all peers by name, and those that an option asks for."""

from __future__ import annotations

from flashtile.cli.console import choices
from flashtile.cli.peers import Flashtile, Peer, Standard
from flashtile.cli.peers_flash import FLASH_2, FLASH_3, FLASH_4
from flashtile.cli.peers_torch import Flex, Sdpa, TorchVarlen
from flashtile.dispatch import BACKENDS

OTHERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Standard(),
        Sdpa(),
        Sdpa("flash"),
        Sdpa("efficient"),
        Sdpa("cudnn"),
        Sdpa("math"),
        Flex(),
        TorchVarlen(),
        FLASH_2,
        FLASH_3,
        FLASH_4,
    )
}


def selected(peers: str, backends: str | None) -> list[Peer]:
    """flashtile, once or once for each backend asked for, and the peers of --peers ("all", "none" or names)."""
    asked = [None] if backends is None else choices(backends, BACKENDS, "--backend")
    own: list[Peer] = [Flashtile(backend) for backend in asked]
    if peers == "none":
        return own
    names = list(OTHERS) if peers == "all" else choices(peers, tuple(OTHERS), "--peers")
    return own + [OTHERS[name] for name in names]
