"""The checks of the servers: whether each answers, which version it holds, and whether it generates."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minpro_megatron.config.server import ServerConfig
from minpro_megatron.fleet.member import Key, Member
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.errors import InvalidAnswer, OutOfFiles, RequestRefused, ServerUnavailable

log = logging.getLogger(__name__)

# An answer to /model_info needs no computation, but the server's process may be busy with a large answer.
MAX_PROBE_S = 30.0
# For one token. SGLang itself gives up after 20 s.
GENERATION_PROBE_S = 30.0


@dataclass(frozen=True)
class ProbeEvents:
    """What the probes report."""

    notify: Callable[[Member], None]  # the state of a server has changed
    fail: Callable[[BaseException], None]  # the run cannot continue
    count: Callable[[str], None]  # one more for the metric fleet/<name>
    out_of_files: Callable[[OutOfFiles], None]
    request_restart: Callable[[Sequence[ServerAddress], str], None]


class Probes:
    """Checks the `members`, which the fleet adds and removes. `version` is the policy version that they should hold."""

    def __init__(
        self, server: ServerConfig, members: Mapping[Key, Member], watch_interval_s: float, events: ProbeEvents
    ) -> None:
        """Servers that do not answer are asked every `watch_interval_s` seconds."""
        self.version = 0
        self._server = server
        self._members = members
        self._watch_interval_s = watch_interval_s
        self._events = events
        self._publications = 0

    def set_version(self, version: int) -> None:
        """The version of a publication that has ended. Answers to earlier questions do not count any more."""
        self.version = version
        self._publications += 1

    @property
    def has_published(self) -> bool:
        """Whether a publication of this start has ended."""
        return self._publications > 0

    def start_due(self) -> None:
        """Starts the probes that are due."""
        now = time.monotonic()
        for member in self._members.values():
            interval_s = self._server.health_interval_s if member.answers else self._watch_interval_s
            if member.probe is None and now - member.probed_at >= interval_s:
                member.probe = asyncio.create_task(self._probe(member))
            if member.has_joined and member.answers and member.generation.is_due(self._server.health_interval_s):
                member.generation.probe = asyncio.create_task(self._probe_generation(member))

    async def _probe(self, member: Member) -> None:
        try:
            await self.ask(member)
        except Exception as error:  # an error in this program must not be taken for a server's
            self._events.fail(error)
        member.probe = None
        if member.probed_at < 0:  # a publication has ended meanwhile: the answer is from before it
            self.start_due()

    async def _probe_generation(self, member: Member) -> None:
        was_well, limit_s = member.generation.is_well, self._server.generation_timeout_s
        try:
            found = await member.generation.ask(lambda: member.client.generates(min(GENERATION_PROBE_S, limit_s)))
        except OutOfFiles as error:
            self._events.out_of_files(error)
            return
        except Exception as error:  # an error in this program must not be taken for a server's
            self._events.fail(error)
            return
        finally:
            member.generation.probe = None
        if found is None:
            return
        if found != was_well:
            state = "generates again" if found else "answers, but generates nothing: it gets no new work"
            log.warning("%s %s", member.name, state)
        if member.generation.is_silent_for(limit_s):
            self._events.request_restart(
                [member.address],
                f"it answers, but has generated nothing for server.generation_timeout_s = {limit_s:g} s",
            )
        self._events.notify(member)

    async def ask(self, member: Member) -> None:
        """Asks the server for its version, and records whether it answers."""
        publications = self._publications
        member.probed_at = time.monotonic()
        try:
            version = await member.client.policy_version(min(MAX_PROBE_S, self._server.unhealthy_after_s))
        except RequestRefused as error:
            if not member.has_joined:  # wrong API key, or not a rollout server
                self._events.fail(error)
            self._unanswered(member, str(error))
        except InvalidAnswer as error:  # it answers, but with an invalid version
            self._answered(member, None, str(error), publications)
        except ServerUnavailable as error:
            self._unanswered(member, str(error))
        except OutOfFiles as error:
            self._events.out_of_files(error)
        else:
            self._answered(member, version, f"it holds version {version}", publications)

    def _answered(self, member: Member, version: int | None, described: str, publications: int) -> None:
        member.answered_at = time.monotonic()
        if not member.answers and member.has_joined:
            log.info("%s answers again", member.name)
        member.answers = True
        if not member.has_joined:
            member.has_joined, member.named_version = True, None
            member.generation.seen()  # serve has seen it generate before it announced the address
            if member.address.start > 0:
                self._events.count("restarts")
            # Only the initial weights are recognized by the version that the server reports, and only before the first
            # publication: any other weights may be left from another run, or from a publication that was interrupted.
            member.held_version = version if version == self.version == 0 and not self.has_published else None
            log.info("%s has joined (start %d): %s", member.name, member.address.start, described)
        elif publications == self._publications:  # otherwise the answer may be older than the last publication
            self._compare_version(member, version, described)
        self._events.notify(member)

    def _compare_version(self, member: Member, version: int | None, described: str) -> None:
        if member.named_version is not None:
            if version == member.named_version:
                member.held_version = version
            else:
                log.warning("%s should hold version %d, but %s", member.name, member.named_version, described)
            member.named_version = None
        # During a publication the version may be higher already; a lower one means that the weights are lost.
        elif member.held_version is not None and (version is None or version < member.held_version):
            log.warning("%s has lost version %d: %s", member.name, member.held_version, described)
            self._events.count("restarts")
            member.held_version = None

    def _unanswered(self, member: Member, described: str) -> None:
        if member.answers:
            log.warning("no new work for a server that does not answer: %s", described)
        member.answers = False
        if member.has_joined and time.monotonic() - member.answered_at > self._server.unhealthy_after_s:
            member.move_groups()
