"""The crashes that `make test-crashes` tries: where in the run, who dies, and how the launch is then to end."""

from dataclasses import dataclass, replace

from tests.e2e.crashes import CrashPoint, Moment, Victim
from tests.e2e.episode_environment import EPISODES

KILLED = 1  # a role died
LAUNCHER_KILLED, LAUNCHER_TERMINATED, GOES_ON = -9, 130, 0

UPDATE = "minpro_megatron.actor.policy:Policy.update"
SCORE = "minpro_megatron.actor.policy:Policy.score"
BEHAVIOR = "minpro_megatron.actor.scoring:BatchScoring.behavior"
FORWARD = "minpro_megatron.actor.forward:ForwardStep.__call__"
PUBLISH = "minpro_megatron.publishing.publish:Publisher.publish"
SEND = "minpro_megatron.publishing.broadcast:Broadcaster.send"
SHARDS = "minpro_megatron.checkpoints.shard_writing:ShardWrite.__init__"
WRITE_SHARDS = "minpro_megatron.checkpoints.shard_writing:_write"
FOLDER = "minpro_megatron.checkpoints.checkpoint_folder:CheckpointFolder.publish"
NAME_FILE = "minpro_megatron.checkpoints.checkpoint_folder:replace_file"
JOURNAL = "minpro_megatron.buffer.journal:Journal"
IN_TRANSACTION = "minpro_megatron.buffer.journal:_expect_rows"
GRADE = "minpro_megatron.rewards.graders:Graders.judge"
GENERATE = "minpro_megatron.fleet.member:Member.generate"
FEED = "minpro_megatron.feed.feed:Feed"
WRITE_REPORT = "minpro_megatron.report.run_end:write_report"
WRITE_SUMMARY = "minpro_megatron.report.run_end:write_summary"
TURN = "minpro_megatron.fleet.episodes:_Episode"
TURNS = "minpro_megatron.publishing.turns:ServerTurns"
ANSWER = "tests.e2e.episode_environment:Again.answer"
BOUNDED_MODE = ("staleness.mode=bounded", "staleness.max_staleness=2")

# A checkpoint is there as soon as its step has ended, and not some time in the next one.
AT_ONCE = ("checkpoint.asynchronous=false",)
# Each phase in the process that it belongs to, at global step 3: there is a checkpoint of version 2.
PHASES = {
    "generating": CrashPoint("collect", GENERATE, call=30),
    "grading": CrashPoint("collect", GRADE, call=30),
    "scoring": CrashPoint("train", FORWARD, call=2, within=SCORE, within_call=10),
    "mid-update": CrashPoint("train", FORWARD, call=2, within=UPDATE, within_call=8),
    # the first publication is that of version 0
    "publishing": CrashPoint("train", SEND, moment="after", within=PUBLISH, within_call=5),
    "checkpointing": CrashPoint("train", WRITE_SHARDS, within=SHARDS, within_call=2, victim="parent"),
    "journal write": CrashPoint(
        "collect", IN_TRANSACTION, moment="after", within=f"{JOURNAL}.consume", within_call=4
    ),
}  # fmt: skip


BESIDE_SCORING = CrashPoint("train", FORWARD, within=BEHAVIOR, within_call=5)


@dataclass(frozen=True)
class Case:
    """One run: a launch for every crash point, each of which ends with `status`, and one that finishes."""

    name: str
    points: tuple[CrashPoint, ...]
    status: int = KILLED
    overrides: tuple[str, ...] = ()
    torn: float | None = None  # the share of the journal's write-ahead log that is left of it
    pruned: bool = False  # the journal forgets tokens: they cannot be compared
    sampled: bool = True  # the run has sampled something when it is crashed: another launch resumes it
    finished: bool = False  # the run has finished when it is crashed: another launch starts nothing

    @property
    def bounded(self) -> bool:
        return "staleness.mode=bounded" in self.overrides

    @property
    def has_episodes(self) -> bool:
        return EPISODES[0] in self.overrides


def each_role_in_each_phase() -> list[Case]:
    """kill -9 of serve, collect and train while each of the seven phases is under way."""
    cases = []
    victims: tuple[Victim, ...] = ("serve", "collect", "train")
    for phase, point in PHASES.items():
        for victim in victims:
            its_own = point.victim if victim == point.process else victim
            overrides = AT_ONCE if phase in ("generating", "grading") else ()
            cases.append(Case(f"{victim} killed, {phase}", (replace(point, victim=its_own),), overrides=overrides))
    return cases


def in_collect() -> list[Case]:
    """Before and after each commit."""
    moments: dict[str, tuple[str, int, Moment]] = {
        "groups issued, not sent": ("issue", 4, "after"),
        "group graded, not committed": ("collect", 22, "before"),
        "group committed, not counted": ("collect", 22, "after"),
        "scores not committed, the next version samples": ("score", 5, "before"),
        "scores committed, not answered": ("score", 6, "after"),
        "version committed, servers not named": ("publish", 4, "after"),
        "evaluation in its file, not in the journal": ("evaluate", 3, "before"),
    }
    return [
        Case(
            f"collect killed, {what}", (CrashPoint("collect", f"{JOURNAL}.{method}", call, moment),), overrides=AT_ONCE
        )
        for what, (method, call, moment) in moments.items()
    ] + [
        Case(
            "collect killed, tokens pruned, pages not given back",
            (CrashPoint("collect", "minpro_megatron.buffer.route_files:RouteFiles.remove", call=2),),
            overrides=("collector.journal_keep_steps=1",),
            pruned=True,
        )
    ]


def in_train() -> list[Case]:
    """Between the requests to collect, around a checkpoint's names, at the run's ends."""
    whole_folder = {"within": FOLDER, "within_call": 2}
    points = {
        "rank 1 killed, mid-update": CrashPoint("train", FORWARD, 2, within=UPDATE, within_call=8, rank=1),
        "rank 0 killed, scores not sent": CrashPoint("train", f"{FEED}.scored", 6),
        "rank 0 killed, updated, step not told": CrashPoint("train", f"{FEED}.consumed", 4),
        "rank 0 killed, weights sent, not told": CrashPoint("train", f"{FEED}.publish_end", 5),
        "rank 0 killed, checkpoint written, not renamed": CrashPoint("train", NAME_FILE, 1, "after", **whole_folder),
        "rank 0 killed, checkpoint renamed, not named": CrashPoint("train", NAME_FILE, 2, **whole_folder),
        "rank 0 killed, checkpoint named, not told": CrashPoint("train", NAME_FILE, 2, "after", **whole_folder),
        "rank 0 killed before the first checkpoint": CrashPoint("train", FORWARD, 2, within=UPDATE, within_call=3),
        "rank 0 killed, before the export": CrashPoint("train", "minpro_megatron.roles.train:write_hf"),
        "rank 0 killed, exported, no report": CrashPoint("train", WRITE_REPORT),
        "rank 0 killed, exported and reported, no summary": CrashPoint("train", WRITE_SUMMARY),
    }
    at_start = {
        "rank 0 killed, publishing version 0": CrashPoint("train", SEND, moment="after"),
        "rank 0 killed, version 0 sent, not told": CrashPoint("train", f"{FEED}.publish_end"),
    }
    # Version 3 is published, and samples the last batch; the batch of version 2 has no scores yet.
    published = {
        "rank 0 killed, published, batch not fetched": CrashPoint("train", f"{FEED}.batch", 5),
        "rank 0 killed, scoring, the next version samples": BESIDE_SCORING,
    }
    return [
        *(Case(name, (point,)) for name, point in points.items()),
        *(Case(name, (point,), sampled=False) for name, point in at_start.items()),
        *(Case(name, (point,), overrides=AT_ONCE) for name, point in published.items()),
    ]


def after_the_end() -> list[Case]:
    """The summary is written: the run has finished, whatever becomes of its processes."""
    written = CrashPoint("train", WRITE_SUMMARY, moment="after")
    launcher = replace(written, victim="launcher")
    return [
        Case("rank 0 killed, summary written", (written,), GOES_ON, finished=True),
        Case("serve killed, summary written", (replace(written, victim="serve"),), GOES_ON, finished=True),
        Case("launcher killed, summary written", (launcher,), LAUNCHER_KILLED, finished=True),
        Case("bounded: launcher killed, summary written", (launcher,), LAUNCHER_KILLED, BOUNDED_MODE, finished=True),
    ]


def again() -> list[Case]:
    """A second crash while the run is being taken up."""
    first = replace(PHASES["mid-update"], victim="self")
    restoring = CrashPoint("collect", "minpro_megatron.buffer.journal_restore:_check", moment="after")
    loading = CrashPoint("train", "minpro_megatron.actor.policy:Policy.load", moment="after", rank=1)
    publishing = CrashPoint("train", SEND, moment="after")
    # whatever the second crash has left to sample
    consumed = CrashPoint("collect", f"{JOURNAL}.consume", 1, "after", victim="serve")
    return [
        Case("rank 0 killed, then collect restoring", (first, restoring)),
        Case("rank 0 killed, then rank 1 loading", (first, loading)),
        Case("rank 0 killed, then rank 0 publishing what it loaded", (first, publishing)),
        Case("collect, then rank 0, then serve killed", (PHASES["journal write"], first, consumed)),
    ]


def without_restart() -> list[Case]:
    """What a launch survives: a rollout server, the process that writes a checkpoint."""
    points = {
        "a server killed, generating": replace(PHASES["generating"], victim="server"),
        "a server killed, between two tokens": CrashPoint(
            "server", "minpro_megatron.reference_engine.engine:Engine._step", call=700
        ),
        "a server killed, publishing": replace(PHASES["publishing"], victim="server"),
        "a server killed, mid-update": replace(PHASES["mid-update"], victim="server"),
        "a server killed, scoring, the next version samples": replace(BESIDE_SCORING, victim="server"),
        "a checkpoint's writer killed": replace(PHASES["checkpointing"], victim="self"),
    }
    return [Case(name, (point,), GOES_ON) for name, point in points.items()]


def from_outside() -> list[Case]:
    """The launcher is killed or told to stop; the journal finds no room, or loses its end."""
    update, generating, write = PHASES["mid-update"], PHASES["generating"], PHASES["journal write"]
    stopped = {"victim": "launcher", "signal": "SIGTERM"}
    consumed = CrashPoint("collect", f"{JOURNAL}.consume", 4, "after")
    return [
        Case("launcher killed, mid-update", (replace(update, victim="launcher"),), LAUNCHER_KILLED),
        Case("SIGTERM, mid-update", (replace(update, **stopped),), LAUNCHER_TERMINATED),
        Case("SIGTERM, generating", (replace(generating, **stopped),), LAUNCHER_TERMINATED),
        Case("SIGTERM, in a journal's transaction", (replace(write, **stopped),), LAUNCHER_TERMINATED),
        Case("no room for the journal", (replace(write, action="limit", file="journal.sqlite-wal"),)),
        Case("no room on the disk", (replace(write, action="fill", file="filler"),)),
        *(Case(f"collect killed, {share:.0%} of its last writes left", (consumed,), torn=share) for share in TORN),
    ]


TORN = (0.02, 0.37, 0.71, 0.99)


def bounded() -> list[Case]:
    """In bounded mode a resumed run is another one, and a whole one."""
    crashed = {
        "rank 0 killed, mid-update": (PHASES["mid-update"], KILLED),
        "collect killed, journal write": (PHASES["journal write"], KILLED),
        "serve killed, generating": (replace(PHASES["generating"], victim="serve"), KILLED),
        "a server killed, generating": (replace(PHASES["generating"], victim="server"), GOES_ON),
        "a server killed, publishing": (replace(PHASES["publishing"], victim="server"), GOES_ON),
    }
    return [Case(f"bounded: {name}", (point,), status, BOUNDED_MODE) for name, (point, status) in crashed.items()]


def in_episodes() -> list[Case]:
    """In each state of a turn: to be sampled, sampled, put to the environment, answered, joined to its group."""
    asked = CrashPoint("collect", ANSWER, call=90)
    collect = {
        "a turn not sent": CrashPoint("collect", f"{TURN}._sampled", call=130),
        "a turn sampled, not put": CrashPoint("collect", f"{TURN}._sampled", call=130, moment="after"),
        "the environment works": asked,
        "a turn answered": CrashPoint("collect", f"{TURN}._answered", call=90, moment="after"),
        "an episode over, its group not": CrashPoint("collect", f"{TURN}._joined", call=70, moment="after"),
    }
    server = {
        "a turn sent": CrashPoint("collect", GENERATE, call=130, victim="server"),
        "the environment works": replace(asked, victim="server"),
    }
    return [
        Case("episodes, undisturbed once more", (), overrides=EPISODES),
        *(
            Case(f"episodes: collect killed, {what}", (point,), overrides=EPISODES + AT_ONCE)
            for what, point in collect.items()
        ),
        *(Case(f"episodes: a server killed, {what}", (point,), GOES_ON, EPISODES) for what, point in server.items()),
        Case("episodes, bounded: collect killed", (asked,), overrides=EPISODES + BOUNDED_MODE),
        Case("episodes, bounded: a server killed", (server["a turn sent"],), GOES_ON, EPISODES + BOUNDED_MODE),
    ]


def in_turns() -> list[Case]:
    """In every transition between the turns of trainer and servers, from the first to the last."""
    turns = ("server.placement=shared",)
    released = CrashPoint("collect", "minpro_megatron.collector.collector:Collector.released", call=3)
    freed = CrashPoint("server", "minpro_megatron.reference_engine.memory:OccupiedMemory.release", call=3)
    resumed = CrashPoint("server", "minpro_megatron.reference_engine.memory:OccupiedMemory.resume", call=5)
    took_over = CrashPoint("train", f"{TURNS}.release", call=3, moment="after")
    gave_back = CrashPoint("train", f"{TURNS}.returned", call=3)
    trainer = {
        "before the first release": CrashPoint("train", f"{TURNS}.begin"),
        "after the first release, without a model": CrashPoint("train", f"{TURNS}.begin", moment="after"),
        "the servers have released": took_over,
        "mid-update, the servers have released": PHASES["mid-update"],
        "publishing": replace(PHASES["publishing"], within_call=4),  # none at the start
        "given back, not reported": gave_back,
    }
    servers = {
        "asked to release": freed,
        "released": replace(freed, moment="after"),
        "mid-update": replace(PHASES["mid-update"], victim="server"),
        "asked for memory again": resumed,
        "with weights, without a cache": replace(resumed, call=6),
        "generating": replace(PHASES["generating"], victim="server"),
    }
    return [
        Case("turns, undisturbed once more", (), overrides=turns),
        *(Case(f"turns: rank 0 killed, {what}", (point,), overrides=turns) for what, point in trainer.items()),
        Case("turns: collect killed, release reported", (released,), overrides=turns),
        Case("turns: collect killed, servers kept", (replace(released, moment="after"),), overrides=turns),
        Case("turns: serve killed, the servers have released", (replace(took_over, victim="serve"),), overrides=turns),
        *(Case(f"turns: a server killed, {what}", (point,), GOES_ON, turns) for what, point in servers.items()),
    ]


def of_sglang() -> list[Case]:
    """With SGLang's own servers, whose tokens are others every time."""
    engine = ("server.engine=sglang",)
    return [
        Case("SGLang: rank 0 killed, mid-update", (PHASES["mid-update"],), overrides=engine),
        Case("SGLang: a server killed, generating", (replace(PHASES["generating"], victim="server"),), GOES_ON, engine),
    ]


def all_cases() -> list[Case]:
    return [
        Case("undisturbed once more", ()),
        *each_role_in_each_phase(),
        *in_collect(),
        *in_train(),
        *after_the_end(),
        *again(),
        *without_restart(),
        *from_outside(),
        *bounded(),
        *in_episodes(),
        *in_turns(),
        *of_sglang(),
    ]
