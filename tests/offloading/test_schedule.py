"""Which module is fetched when, into which buffer: bookkeeping, without tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fourfold.errors import ConfigurationError
from fourfold.offloading.order import Order
from fourfold.offloading.schedule import Schedule

LAYERS = 6


@dataclass
class Device:
    """Notes what it is told, in the order in which it is told. An event is its place in that order.

    Attributes:
        said: all of it.
        holds: module in each buffer, by what was copied.
        fails: whether copies fail.
        current: the line of computing.
    """

    said: list[tuple] = field(default_factory=list)
    holds: dict[int, int] = field(default_factory=dict)
    fails: bool = False
    current: int = 0

    def _say(self, *words: object) -> int:
        self.said.append(words)
        return len(self.said) - 1

    def fill(self, copies: tuple[int, int], after: list[int]) -> int:
        if self.fails:
            raise RuntimeError("the copy failed")
        module, buffer = copies
        self.holds[buffer] = module
        return self._say("fill", *copies, tuple(after))

    def wait(self, event: int) -> None:
        self._say("wait", event)

    def lend(self, memory: Any) -> None: ...

    def mark(self) -> int:
        return self._say("mark")

    def line(self) -> int:
        return self.current


def made(buffers: int = 2, layers: int = LAYERS) -> tuple[Schedule, Device]:
    device = Device()
    return Schedule([10 + i for i in range(layers)], buffers, device, lambda *copy: copy), device


def use(schedule: Schedule, module: int) -> None:
    slot = schedule.begin(module)
    device: Any = schedule._engine
    assert device.holds[slot] == module
    schedule.end(slot)
    assert all(not s.users for s in schedule.slots)


def training(layers: int = LAYERS, uses: int = 1, recomputed: bool = True) -> Iterator[int]:
    """Modules in the order of a step: forward, then for each recomputed forward and backward."""
    yield from range(layers)
    for module in reversed(range(layers)):
        yield from [module] * (uses + recomputed)


def counted(schedule: Schedule, modules: Iterator[int] | range) -> tuple[int, int]:
    """Misses and fillings of a pass."""
    before = (schedule.counts.misses, schedule.counts.fills)
    for module in modules:
        use(schedule, module)
    return schedule.counts.misses - before[0], schedule.counts.fills - before[1]


@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("uses", [1, 2])  # products differentiated at once, or one by one
@pytest.mark.parametrize("buffers", [2, 3, 4])
def test_after_one_step_every_use_finds_its_module_and_nothing_is_copied_twice(
    buffers: int, uses: int, recomputed: bool
) -> None:
    schedule, _ = made(buffers)
    counted(schedule, training(uses=uses, recomputed=recomputed))
    for _ in range(3):
        misses, fills = counted(schedule, training(uses=uses, recomputed=recomputed))
        assert misses == 0
        assert fills == 2 * (LAYERS - buffers)  # (those at either turn are still there)


def test_the_first_pass_misses_its_first_module_alone() -> None:
    schedule, _ = made()
    assert counted(schedule, range(LAYERS)) == (1, LAYERS)


def test_passes_that_only_go_upwards() -> None:
    schedule, _ = made()
    counted(schedule, range(LAYERS))
    counted(schedule, range(LAYERS))
    for _ in range(3):
        assert counted(schedule, range(LAYERS)) == (0, LAYERS)


def test_evaluation_between_steps_costs_no_more_than_the_change() -> None:
    schedule, _ = made()
    for _ in range(2):
        counted(schedule, training())
    for _ in range(3):
        assert counted(schedule, range(LAYERS))[0] <= 1
        assert counted(schedule, range(LAYERS))[0] <= 1
        assert counted(schedule, training())[0] <= 1
        assert counted(schedule, training()) == (0, 2 * (LAYERS - 2))


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_the_first_step_after_evaluations_copies_no_more_than_a_first_step(buffers: int) -> None:
    """Modules are then used more often in their places than ever before: they stay until then."""
    schedule, _ = made(buffers)
    for _ in range(2):
        counted(schedule, range(LAYERS))
    misses, fills = counted(schedule, training(uses=2))
    assert fills <= 2 * LAYERS
    assert misses <= (LAYERS if buffers == 1 else 2)
    assert counted(schedule, training(uses=2))[0] <= 1


def test_one_buffer_serves_and_is_never_filled_ahead_of_a_use() -> None:
    schedule, device = made(1)
    for _ in range(3):
        counted(schedule, training())
    assert schedule.counts.misses + schedule.counts.hits == 3 * 3 * LAYERS
    fills = [s for s in device.said if s[0] == "fill"]
    assert len(fills) <= 3 * (2 * LAYERS)


def test_the_next_copy_begins_as_soon_as_a_buffer_is_done_with() -> None:
    """Before the next module is asked for: so a copy has the time of all that is computed in between."""
    schedule, device = made()
    for _ in range(2):
        counted(schedule, training())
    use(schedule, 0)
    use(schedule, 1)
    assert device.said[-1][:2] == ("fill", 3)
    assert {s.content for s in schedule.slots} == {2, 3}


def test_a_buffer_is_filled_after_all_its_uses_and_used_after_it_is_filled() -> None:
    schedule, device = made()
    filled: dict[int, int] = {}  # buffer -> event of its last filling
    uses = {0: {0: 0}, 1: {0: 0}}  # buffer -> the last event of each line, for its next filling to wait for
    assert device.said == [("mark",)]  # (of what was computed before there were buffers)
    seen = 1

    def read() -> list[tuple]:
        nonlocal seen
        new = list(enumerate(device.said))[seen:]
        seen = len(device.said)
        for place, words in new:
            if words[0] == "fill":
                _, _, buffer, after = words
                assert sorted(after) == sorted(uses[buffer].values())
                uses[buffer], filled[buffer] = {}, place
        return [words for _, words in new]

    for count, module in enumerate([*training(), *training(), *range(LAYERS)]):
        device.current = count % 3 if count > 3 * LAYERS else 0  # (several streams, later on)
        slot = schedule.begin(module)
        assert ("wait", filled_when_asked(read(), filled, slot)) in device.said[-3:]
        place = len(device.said)
        schedule.end(slot)
        assert device.said[place] == ("mark",)
        uses[slot][device.current] = place
        read()


def filled_when_asked(said: list[tuple], filled: dict[int, int], slot: int) -> int:
    """The event that a use of this buffer waits for, which it says exactly once."""
    assert [words for words in said if words[0] == "wait"] == [("wait", filled[slot])]
    return filled[slot]


def test_buffers_that_are_never_filled_again_keep_one_event_for_each_line() -> None:
    schedule, device = made(layers=2)
    for count in range(200):
        device.current = count % 3
        use(schedule, count % 2)
    assert schedule.counts.fills == 2
    assert all(set(slot.used) == {0, 1, 2} for slot in schedule.slots)
    assert max(max(slot.used.values()) for slot in schedule.slots) == len(device.said) - 1


def test_a_closed_schedule_begins_no_copy_and_lets_uses_end() -> None:
    schedule, device = made()
    slot = schedule.begin(0)
    before = len(device.said)
    schedule.close()
    schedule.end(slot)
    assert [words[0] for words in device.said[before:]] == ["mark"]


def test_nested_uses_count_once_and_keep_the_buffer() -> None:
    schedule, _ = made()
    outer = schedule.begin(0)
    inner = schedule.begin(0)
    assert outer == inner
    schedule.end(inner)
    other = schedule.begin(1)
    assert other != outer
    assert schedule.slots[outer].content == 0
    schedule.end(other)
    schedule.end(outer)
    assert schedule.counts.hits + schedule.counts.misses == 2


def test_more_uses_at_once_than_buffers_is_an_error_that_leaves_them_usable() -> None:
    schedule, _ = made()
    held = [schedule.begin(0), schedule.begin(1)]
    with pytest.raises(ConfigurationError, match=r"all 2 buffers .* larger `buffers`"):
        schedule.begin(2)
    for slot in held:
        schedule.end(slot)
    use(schedule, 2)


@pytest.mark.parametrize("at", range(2 * LAYERS))
def test_a_copy_that_fails_leaves_nothing_behind(at: int) -> None:
    schedule, device = made()
    counted(schedule, training())
    modules = list(training())
    device.fails = True
    for module in modules[at : at + 3]:
        try:
            schedule.end(schedule.begin(module))
        except RuntimeError:
            pass
    device.fails = False
    assert all(not s.users for s in schedule.slots)
    assert all(s.content in (None, device.holds[s.number]) for s in schedule.slots)
    for _ in range(2):
        counted(schedule, training())  # (`use` checks that the module is there)
    assert counted(schedule, training())[0] == 0


def test_a_step_broken_off_costs_a_miss_at_most() -> None:
    schedule, _ = made()
    for _ in range(2):
        counted(schedule, training())
    for at in range(1, 3 * LAYERS):
        for module in list(training())[:at]:
            use(schedule, module)
        assert counted(schedule, training())[0] <= 2
        assert counted(schedule, training())[0] <= 1
        assert counted(schedule, training())[0] == 0


def test_order_is_learned_whatever_it_is() -> None:
    order, sequence = Order(5), [3, 0, 4, 4, 1, 2]
    for module in sequence * 2:
        order.note(module)
    order.note(3)
    assert order.upcoming(4) == [0, 4, 1, 2]
    order.note(0)
    order.note(4)
    assert order.upcoming(2) == [4, 1]  # (used twice there)
    order.note(4)
    assert order.upcoming(2) == [1, 2]


def test_a_part_serves_its_own_use_alone() -> None:
    schedule, device = made()
    counted(schedule, range(LAYERS))
    counted(schedule, range(LAYERS))
    fills, upcoming = schedule.counts.fills, schedule.order.upcoming(2)
    slot = schedule.begin_part(4, lambda number: ("some", number), 3)
    assert device.said[-2][:3] == ("fill", "some", slot)
    inner = schedule.begin(4)  # a product inside of the forward
    assert inner == slot
    schedule.end(inner)
    assert schedule.slots[slot].users == 1
    schedule.end(slot, fill_ahead=False)
    assert schedule.slots[slot].content is None
    assert schedule.counts.parts == 1
    assert schedule.counts.fills == fills  # (nothing was filled ahead)
    assert schedule.order.upcoming(2) == upcoming  # (and nothing learned)
    use(schedule, 4)
    assert schedule.counts.fills > fills


def test_a_part_is_not_brought_where_the_whole_module_is() -> None:
    schedule, _ = made()
    use(schedule, 0)
    slot = schedule.begin_part(0, lambda number: pytest.fail("it is there"), 3)
    schedule.end(slot, fill_ahead=False)
    assert schedule.slots[slot].content == 0


def test_products_inside_a_part_that_is_there_copy_nothing() -> None:
    schedule, _ = made()
    counted(schedule, range(LAYERS))
    fills = schedule.counts.fills
    schedule.end(schedule.begin_part(0, lambda slot: (99, slot), 1), fill_ahead=False)
    (held,) = (s.content for s in schedule.slots if s.content is not None)
    number = schedule.begin_part(held, lambda slot: (99, slot), 1)
    schedule.end(schedule.begin(held))
    schedule.end(number, fill_ahead=False)
    assert schedule.counts.parts == 1
    assert schedule.counts.fills == fills


def test_a_part_of_another_thread_is_not_taken_for_the_module() -> None:
    schedule, _ = made(buffers=3)
    mine = schedule.begin_part(4, lambda number: ("mine", number), 3)
    found: list[int] = []

    def other() -> None:
        for begin in (
            lambda: schedule.begin_part(4, lambda number: ("other", number), 3),
            lambda: schedule.begin(4),
        ):
            slot = begin()
            found.append(slot)
            schedule.end(slot)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(found) == 2
    assert mine not in found
    schedule.end(mine)


def test_a_part_that_fails_leaves_its_buffer_empty() -> None:
    schedule, device = made()
    use(schedule, 0)
    device.fails = True
    with pytest.raises(RuntimeError, match="the copy failed"):
        schedule.begin_part(3, lambda number: ("some", number), 3)
    device.fails = False
    assert all(slot.content in (None, device.holds[slot.number]) for slot in schedule.slots)
    assert all(not slot.users and slot.part_of is None for slot in schedule.slots)
    use(schedule, 3)
