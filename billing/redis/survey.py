"""What servers of Redis say of themselves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Server:
    """One server.

    Args:
        version: as it says.
        policy: what it does when its memory is full.
        lineage: whether it tells its replication id, by which a promoted replica is known (lua/lineage.lua).
    """

    version: str
    policy: str
    lineage: bool

    @classmethod
    def read(cls, *infos: bytes) -> "Server":
        """Read the sections ``server``, ``memory`` and ``replication`` of INFO."""
        said = dict(
            line.strip().split(":", 1)
            for info in infos
            for line in info.decode().splitlines()
            if ":" in line and not line.startswith("#")
        )
        return cls(
            version=said.get("redis_version", "0"),
            policy=said.get("maxmemory_policy", ""),
            lineage=bool(said.get("master_replid")),
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """All servers of a link.

    Args:
        servers: that answered.
        away: addresses that did not.
        shape: of a cluster, in words; empty for one server.
        faults: what is wrong with the cluster as such, each with its remedy.
    """

    servers: tuple[Server, ...]
    away: tuple[str, ...] = ()
    shape: str = ""
    faults: tuple[str, ...] = ()
