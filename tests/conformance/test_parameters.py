"""Every migration parameter against a real QEMU: the same requests, the same answers."""
# ruff: noqa: E501

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Final

import pytest

from engine.control.parameter_table import PARAMETERS, UINT64_MAX, Kind, Parameter
from engine.control.parameters import ParameterStore, hmp_lines, parse_hmp_value
from engine.errors import UsageError
from tests.conformance.compare import Difference, command, compare
from tests.conformance.peers import Peer, both, peer

QUERY: Final = {"execute": "query-migrate-parameters"}
OURS: Final = Difference(
    "query-migrate-parameters",
    rf"return\.({'|'.join(one.name for one in PARAMETERS if one.is_ours)})",
    "Queries show ramferry's own parameters besides QEMU's.",
    shown_by=[QUERY],
)
UNKNOWN: Final = Difference(
    "nope.*nope",
    r"error\.desc",
    "Of several unknown members QEMU names any one, ramferry the first.",
    shown_by=[command("migrate-set-parameters", nope=1, nope2=2, nope3=3)],
)
LACKS: Final = Difference(
    r'"mode": "(cpr-reboot|cpr-transfer)"',
    "return|error",
    "Values of mode that this build has not are refused, after QEMU's checks.",
    shown_by=[
        command("migrate-set-parameters", mode=mode) for mode in ("cpr-reboot", "cpr-transfer")
    ],
)
NEWER: Final = Difference(
    "cpr-exec-command",
    "return|error",
    "`cpr-exec-command` of newer QEMUs is kept, and shown once it was set.",
    shown_by=[command("migrate-set-parameters", cpr_exec_command=["a"])],
)
OLDER: Final = Difference(
    r'"(compress-level|compress-threads|compress-wait-thread|decompress-threads)"',
    r"return|error|error\.desc",
    "The parameters of the old compression are kept, and shown once they were set.",
    shown_by=[
        command("migrate-set-parameters", **given)
        for given in (
            {"compress-level": 1},
            {"compress-threads": 1},
            {"compress-wait-thread": True},
            {"decompress-threads": 1},
        )
    ],
)
OLD_COMMANDS: Final = Difference(
    "migrate_set_speed|migrate_set_downtime|migrate-set-cache-size|query-migrate-cache-size",
    r"return|error|error\.(class|desc)",
    "Commands that QEMU gave up in 6.0 set and show today's parameters.",
    shown_by=[
        command("migrate_set_speed", value=1),
        command("migrate_set_downtime", value=1),
        command("migrate-set-cache-size", value=4096),
        command("query-migrate-cache-size"),
    ],
)
LONG: Final = Difference(
    "~{200}|a{200}", r"error\.desc", "A message repeats at most 100 characters of what was given.",
    shown_by=[
        command("migrate-set-parameters", mode="~" * 200),
        command("migrate-set-parameters", block_bitmap_mapping=[
            {"node-name": "n", "alias": "a" * 256, "bitmaps": []}]),
    ],
)  # fmt: skip
DIFFERENCES: Final = (OURS, UNKNOWN, LACKS, NEWER, OLDER, OLD_COMMANDS, LONG)

QEMUS: Final = [
    one for one in PARAMETERS if not (one.is_ours or one.is_hidden) or one.kind is Kind.MAPPING
]
NUMBERS: Final = (Kind.SIZE, Kind.UINT64, Kind.UINT32, Kind.UINT16, Kind.UINT8)
#: Values of every JSON type, and numbers at every border of QAPI's types.
ODD_VALUES: Final[tuple[Any, ...]] = (
    "", "x", "1", "1G", "on", True, False, None, [], [[]], [1], {}, {"a": 1},
    0.0, 1.0, 1.5, -1.0, 1e3, 1e30, -1, -(2**31), -(2**63), -(2**63) - 1, 0,
    255, 256, 2**16, 2**32 - 1, 2**32, 2**63 - 1, 2**63, UINT64_MAX, UINT64_MAX + 1, 10**30,
)  # fmt: skip
#: A value of its type that is out of range; zero-copy-send is on, so compression is out, too.
OUT_OF_RANGE: Final[dict[str, Any]] = {
    "throttle-trigger-threshold": 0,
    "cpu-throttle-initial": 100,
    "cpu-throttle-increment": 0,
    "downtime-limit": 2000001,
    "multifd-channels": 0,
    "multifd-zlib-level": 10,
    "multifd-qatzip-level": 0,
    "multifd-zstd-level": 21,
    "xbzrle-cache-size": 3,
    "max-cpu-throttle": 0,
    "announce-initial": 100001,
    "announce-max": 100001,
    "announce-rounds": 1001,
    "announce-step": 0,
    "block-bitmap-mapping": [{"node-name": "a", "alias": "", "bitmaps": []}],
    "multifd-compression": "zlib",
    "x-vcpu-dirty-limit-period": 0,
    "vcpu-dirty-limit": 0,
}


def setting(**values: object) -> dict[str, object]:
    return set_all({name.replace("_", "-"): value for name, value in values.items()})


def set_all(arguments: dict[str, Any]) -> dict[str, object]:
    return {"execute": "migrate-set-parameters", "arguments": arguments}


def capabilities(**states: bool) -> dict[str, object]:
    entries = [
        {"capability": name.replace("_", "-"), "state": state} for name, state in states.items()
    ]
    return {"execute": "migrate-set-capabilities", "arguments": {"capabilities": entries}}


def with_queries(requests: Iterable[object]) -> Iterator[object]:
    """What each request left behind is compared, too."""
    for request in requests:
        yield request
        yield QUERY


def borders(parameter: Parameter) -> Iterator[object]:
    """Both sides of both borders."""
    for border in (parameter.low, parameter.high):
        yield from (border - 1, border, border + 1)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Peer, Peer]]:
    """One pair for tests that leave every value as it was."""
    with both() as pair:
        yield pair


def test_a_fresh_process_shows_qemus_parameters_and_defaults(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare([QUERY], qemu.client, ours.client, [OURS])
    named_like_qemus = {"multifd-lz4-acceleration"}
    ours_only = {one.name for one in PARAMETERS if one.is_ours} - named_like_qemus
    assert all(name.startswith("x-") for name in ours_only)
    shown = qemu.client.ask(QUERY)["return"]
    assert {one.name for one in QEMUS} == {*shown, "block-bitmap-mapping"}


def test_every_number_has_qemus_borders(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    for one in QEMUS:
        if one.kind in NUMBERS:
            requests = [set_all({one.name: value}) for value in borders(one)]
            back = set_all({one.name: one.default})
            compare(with_queries([*requests, back]), qemu.client, ours.client, [OURS])


@pytest.mark.parametrize("name", [one.name for one in QEMUS])
def test_every_type_of_value_is_answered_alike(name: str, shared: tuple[Peer, Peer]) -> None:
    qemu, ours = shared
    default = qemu.client.ask(QUERY)["return"].get(name, [])
    requests = [set_all({name: value}) for value in ODD_VALUES]
    compare(with_queries([*requests, set_all({name: default})]), qemu.client, ours.client, [OURS])


def test_every_name_of_an_enum_is_answered_alike(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    names = {
        "multifd-compression": (
            "none",
            "zlib",
            "zstd",
            "qatzip",
            "qpl",
            "uadk",
            "gzip",
            "None",
            "~" * 200,
        ),
        "mode": ("normal", "cpr-exec", "Normal", "foo"),
        "zero-page-detection": ("none", "legacy", "multifd", "foo"),
    }
    requests = [set_all({name: value}) for name, values in names.items() for value in values]
    compare(with_queries(requests), qemu.client, ours.client, [OURS, LONG])


def test_values_that_only_qemu_has_are_refused_and_change_nothing(
    peers: tuple[Peer, Peer],
) -> None:
    qemu, ours = peers
    before = ours.client.ask(QUERY)
    for value in ("cpr-reboot", "cpr-transfer"):
        request = set_all({"mode": value, "downtime-limit": 7})
        compare([request], qemu.client, ours.client, [LACKS])
        answer = ours.client.ask(request)
        assert f"has no mode '{value}' yet" in answer["error"]["desc"]
        assert ours.client.ask(QUERY) == before
        # QEMU's own checks come first
        compare([set_all({"mode": value, "multifd-channels": 0})], qemu.client, ours.client)


def test_unknown_members_and_no_members(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    requests: list[object] = [
        {"execute": "migrate-set-parameters"},
        set_all({}),
        set_all({"nope": 1}),
        set_all({"": 1}),
        set_all({"nope": 1, "downtime-limit": 5}),
        set_all({"downtime-limit": 5, "nope": 1}),
        set_all({"downtime_limit": 5}),
        set_all({"nope": 1, "downtime-limit": "x"}),
        set_all({"nope": 1, "downtime-limit": 2000001}),
        set_all({"nope": 1, "mode": "foo"}),
        set_all({"nope": 1, "nope2": 2, "nope3": 3}),
        {"execute": "migrate-set-parameters", "arguments": []},
        {"execute": "query-migrate-parameters", "arguments": {"nope": 1}},
    ]
    compare(with_queries(requests), qemu.client, ours.client, [OURS, UNKNOWN])


def test_of_two_wrong_types_qemus_first_is_told(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    names = [one.name for one in QEMUS]
    requests = [set_all({b: [[]], a: [[]]}) for a, b in itertools.combinations(names, 2)]
    compare([*requests, QUERY], qemu.client, ours.client, [OURS])


def test_of_two_wrong_values_qemus_first_is_told(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    requests = [
        set_all({b: OUT_OF_RANGE[b], a: OUT_OF_RANGE[a]})
        for a, b in itertools.combinations(OUT_OF_RANGE, 2)
    ]
    both_on = capabilities(multifd=True, zero_copy_send=True)
    compare([both_on, *requests, QUERY], qemu.client, ours.client, [OURS])


def test_one_wrong_value_among_good_ones_changes_nothing(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    good = {"downtime-limit": 7, "tls-creds": "a", "direct-io": True, "announce-max": 9}
    requests = [
        set_all({**good, name: value})
        for name, value in OUT_OF_RANGE.items()
        if name not in (*good, "multifd-compression")
    ]
    requests += [set_all({**good, one.name: [[]]}) for one in QEMUS if one.name not in good]
    compare(with_queries([*requests, set_all(good)]), qemu.client, ours.client, [OURS])


def test_rules_between_throttles(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    requests = [
        setting(max_cpu_throttle=19),
        setting(max_cpu_throttle=20),
        setting(cpu_throttle_initial=21),
        setting(cpu_throttle_initial=50, max_cpu_throttle=40),
        setting(cpu_throttle_initial=50, max_cpu_throttle=50),
        setting(cpu_throttle_initial=99),
        setting(cpu_throttle_initial=100, max_cpu_throttle=100),
        setting(max_cpu_throttle=99, cpu_throttle_initial=99),
        setting(max_cpu_throttle=98),
    ]
    compare(with_queries(requests), qemu.client, ours.client, [OURS])


def test_sizes_of_the_xbzrle_cache(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    sizes = [0, 1, 2048, 4095, 4096, 4097, 8192, 12288, 2**32, 2**32 + 4096, 2**62, 2**63]
    sizes += [2**63 + 2**62, UINT64_MAX, -(2**63), -4096]
    requests = [setting(xbzrle_cache_size=size) for size in sizes]
    compare(with_queries(requests), qemu.client, ours.client, [OURS])


def test_null_and_the_empty_string_end_tls(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    requests = [
        setting(tls_creds="a", tls_hostname="b", tls_authz="c"),
        setting(tls_creds=None),
        setting(tls_hostname="", tls_authz=None),
        setting(tls_creds=""),
        setting(tls_creds="\u00e4\u20ac", tls_hostname="'\"\\"),
        setting(tls_creds=None, tls_hostname=None, tls_authz=None),
    ]
    compare(with_queries(requests), qemu.client, ours.client, [OURS])


def test_zero_copy_forbids_tls_and_compression(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    requests = [
        capabilities(multifd=True, zero_copy_send=True),
        setting(tls_creds="a"),
        setting(tls_hostname="a"),
        setting(tls_creds=""),
        setting(multifd_compression="zlib"),
        setting(multifd_compression="zstd"),
        setting(multifd_compression="none"),
        setting(multifd_zlib_level=5),
        capabilities(zero_copy_send=False),
        setting(tls_creds="a"),
        capabilities(zero_copy_send=True),
        setting(tls_creds=""),
        capabilities(zero_copy_send=True),
    ]
    compare(with_queries(requests), qemu.client, ours.client, [OURS])


def node(name: object = "a", alias: object = "b", bitmaps: object = None, **more: object) -> Any:
    return {"node-name": name, "alias": alias, "bitmaps": bitmaps or [], **more}


def bitmap(name: object = "x", alias: object = "y", **more: object) -> Any:
    return {"name": name, "alias": alias, **more}


MAPPINGS: Final[tuple[Any, ...]] = (
    [1], ["a"], [None], [{}], [{"alias": "a"}], [{"node-name": "a"}], [{"node-name": "a", "alias": "b"}],
    [node(1)], [node(alias=None)], [node(bitmaps=1)], [node(bitmaps={"a": 1})], [node(bitmaps=[1])],
    [node(bitmaps=[{}])], [node(bitmaps=[{"name": "x"}])], [node(bitmaps=[{"alias": "x"}])],
    [node(bitmaps=[bitmap(1)])], [node(bitmaps=[bitmap(alias=True)])], [node(bitmaps=[bitmap(foo=1)])],
    [node(foo=1)], [node(foo=1), 1], [node(), node(1)], [node(bitmaps=[bitmap(), bitmap(1)])],
    [node(bitmaps=[bitmap(transform=1)])], [node(bitmaps=[bitmap(transform=None)])],
    [node(bitmaps=[bitmap(transform={"persistent": 1})])], [node(bitmaps=[bitmap(transform={"foo": 1})])],
    [node(bitmaps=[bitmap(transform={"persistent": True, "foo": 1})])],
    [node(bitmaps=[bitmap(transform={})])], [node(bitmaps=[bitmap(transform={"persistent": True})])],
    [node(alias="1a")], [node(alias="")], [node(alias="#a")], [node(alias="a b")], [node(alias="a\u00e4")],
    [node(alias="\u00e4")], [node(alias="_a")], [node(alias="a-b.c_D9")], [node(alias="Z")],
    [node("")], [node("n" * 31)], [node("n" * 32)], [node("\u00e4" * 16)], [node(alias="b" * 255)],
    [node(), node()], [node(), node(alias="c")], [node(), node("c")],
    [node("c", "d"), node(), node("a", "d")], [node(alias="c"), node("b", "c"), node(alias="1")],
    [node(bitmaps=[bitmap(), bitmap(alias="z")])], [node(bitmaps=[bitmap(), bitmap("z")])],
    [node(bitmaps=[bitmap(), bitmap()])], [node(bitmaps=[bitmap(), bitmap("z", "w")])],
    [node(bitmaps=[bitmap()]), node("c", "d", [bitmap()])], [node(bitmaps=[bitmap("", "")])],
    [node(bitmaps=[bitmap(), bitmap("z")]), node(alias="1")], [node(bitmaps=[bitmap("#", "#")])],
    [node(bitmaps=[bitmap("b" * 1023)])], [node(bitmaps=[bitmap(alias="b" * 255)])], [],
)  # fmt: skip
LONG_MAPPINGS: Final[tuple[Any, ...]] = (
    [node(alias="a" * 256)],
    [node("~" * 200)],
    [node(bitmaps=[bitmap("a" * 1024)])],
    [node(bitmaps=[bitmap(alias="~" * 256)])],
)


def test_every_rule_of_block_bitmap_mapping(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    requests = [setting(block_bitmap_mapping=mapping) for mapping in MAPPINGS]
    compare(with_queries(requests), qemu.client, ours.client, [OURS])
    requests = [setting(block_bitmap_mapping=mapping) for mapping in LONG_MAPPINGS]
    compare(with_queries(requests), qemu.client, ours.client, [OURS, LONG])
    for mapping, text in zip(
        LONG_MAPPINGS,
        ("a...' is longer than 255", "~...' is longer than 31", "longer than 1023", "than 255"),
        strict=True,
    ):
        answer = ours.client.ask(setting(block_bitmap_mapping=mapping))
        assert text in answer["error"]["desc"]


def test_a_destination_answers_alike(destinations: tuple[Peer, Peer]) -> None:
    qemu, ours = destinations
    requests = [
        QUERY,
        setting(multifd_channels=4),
        {"execute": "migrate-incoming", "arguments": {"uri": "tcp:127.0.0.1:0"}},
        setting(multifd_channels=5, downtime_limit=1),
        setting(multifd_channels=0),
    ]
    compare(with_queries(requests), qemu.client, ours.client, [OURS])


def test_what_is_newer_and_older_than_qemu_10_is_kept_and_shown_once_set(
    peers: tuple[Peer, Peer],
) -> None:
    qemu, ours = peers
    given: dict[str, Any] = {
        "cpr-exec-command": ["a", "-b c"],
        "compress-level": 9,
        "compress-threads": 255,
        "compress-wait-thread": False,
        "decompress-threads": 1,
    }
    for name, value in given.items():
        compare([set_all({name: value})], qemu.client, ours.client, [NEWER, OLDER])
        assert ours.client.ask(QUERY)["return"][name] == value
    refused = {"compress-level": 10, "compress-threads": 0, "decompress-threads": 256}
    for name, value in refused.items():
        compare([set_all({name: value})], qemu.client, ours.client, [OLDER])
        assert ours.client.ask(QUERY)["return"][name] == given[name]


def test_old_commands_set_and_show_todays_parameters(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    downtime = "Parameter 'downtime_limit' expects an integer in the range of 0 to 2000 seconds"
    cache = "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"
    steps: list[tuple[str, Any, str, str, Any]] = [
        ("migrate_set_speed", 4096, "", "max-bandwidth", 4096),
        ("migrate_set_speed", -1, "", "max-bandwidth", UINT64_MAX),
        ("migrate_set_downtime", 0.25, "", "downtime-limit", 250),
        ("migrate_set_downtime", 2000, "", "downtime-limit", 2000000),
        ("migrate_set_downtime", 2000.1, downtime, "downtime-limit", 2000000),
        ("migrate_set_downtime", -0.1, downtime, "downtime-limit", 2000000),
        ("migrate_set_downtime", 1.9999, "", "downtime-limit", 1999),
        ("migrate-set-cache-size", 8192, "", "xbzrle-cache-size", 8192),
        ("migrate-set-cache-size", 8193, cache, "xbzrle-cache-size", 8192),
    ]
    for old, value, text, name, kept in steps:
        request = command(old, value=value)
        compare([request], qemu.client, ours.client, [OLD_COMMANDS])
        answer = ours.client.ask(request)
        assert answer.get("error", {}).get("desc", "") == text
        assert ours.client.ask(QUERY)["return"][name] == kept
    request = {"execute": "query-migrate-cache-size"}
    compare([request], qemu.client, ours.client, [OLD_COMMANDS])
    assert ours.client.ask(request) == {"return": 8192}


HMP_TEXTS: Final = (
    "0", "1", "7", "+7", "-0", "-1", "-5k", "007", "010", "08", "0x10", "0X1f", "0x10k", "0x", "1.5", "1.0",
    ".5", "1.", ".", "1.00001k", "1.999k", "1.5B", "5K", "5kb", "5kk", "5p", "1E", "8E", "16E", "1e3",
    "8796093022207", "8796093022208", "18446744073709551615", "18446744073709551616", "-18446744073709551615",
    "99999999999999999999", "256", "x", "3x", "1-3", "3,4", '""', "on", "yes", "y", "true", "ON", "off", "no",
    "n", "false", "none", "normal", "legacy", "foo",
)  # fmt: skip


def hmp_answer(store: ParameterStore, name: str, text: str) -> str:
    """What HMP prints after `migrate_set_parameter NAME TEXT`."""
    try:
        store.set({name: parse_hmp_value(name, "" if text == '""' else text)})
    except UsageError as exc:
        return f"Error: {exc}"
    return ""


def test_hmp_reads_values_as_qemus_does_and_prints_them_alike() -> None:
    store = ParameterStore()
    ours = {one.name for one in PARAMETERS if one.is_ours}
    unlike = []
    with peer("qemu") as qemu:

        def ask(line: str) -> str:
            answer = qemu.client.execute("human-monitor-command", command_line=line)
            return str(answer["return"]).replace("\r", "").rstrip("\n")

        for name in (*(one.name for one in QEMUS), "nope"):
            for text in HMP_TEXTS:
                theirs = ask(f"migrate_set_parameter {name} {text}")
                if theirs != (own := hmp_answer(store, name, text)):
                    unlike.append((name, text, theirs, own))
                qemus = {k: v for k, v in store.values.as_dict().items() if k not in ours}
                assert qemu.client.ask(QUERY)["return"] == qemus, (name, text)
        assert unlike == []
        shown = {k: v for k, v in store.values.as_dict().items() if k not in ours}
        assert ask("info migrate_parameters").split("\n") == hmp_lines(shown)
        mapping = [node(bitmaps=[bitmap(), bitmap("v", "w")]), node("c", "d")]
        qemu.client.ask(setting(block_bitmap_mapping=mapping))
        store.set({"block-bitmap-mapping": mapping})
        shown = {k: v for k, v in store.values.as_dict().items() if k not in ours}
        assert ask("info migrate_parameters").split("\n") == hmp_lines(shown)
