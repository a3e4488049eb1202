"""Devices by name and number, and how fast a ring over them is."""

from __future__ import annotations

import pytest

from nacre.errors import ConfigError
from nacre.growth import devices
from nacre.growth.devices import DEVICES, LINK_EFFICIENCY, Cluster


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64xH200", ("H200", 64)),
        ("H100", ("H100", 1)),
        (" 8 x mi300x ", ("MI300X", 8)),
        ("2xRTX 4090", ("RTX4090", 2)),
        ("here", ("here", 1)),
        ("1xHERE", ("here", 1)),
    ],
)
def test_names(text: str, expected: tuple[str, int]) -> None:
    assert devices.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64xH9000", "--devices: unknown device 'H9000' (did you mean 'H200'? known: A100, H100"),
        ("0xH100", "--devices: '0xH100' is none (at least 1)"),
        ("64x", "--devices: '64x' names no device (known: A100"),
        ("", "--devices: '' names no device (known: A100"),
        ("-1xH100", "--devices: unknown device '-1xH100'"),
        ("2xhere", "--devices: '2xhere', but here is this one machine"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        devices.parse(text)
    assert str(raised.value).startswith(message)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    device = DEVICES["H100"]
    assert Cluster(device).link == 0
    assert Cluster(device, 8).link == LINK_EFFICIENCY * device.link
    ports = device.node * device.network
    assert ports < device.link
    assert Cluster(device, 9).link == LINK_EFFICIENCY * ports
    card = DEVICES["RTX4090"]
    assert Cluster(card, 2).link == LINK_EFFICIENCY * card.link


def test_every_device_is_whole() -> None:
    for device in DEVICES.values():
        assert device.source
        assert device.flops > device.bandwidth > device.link >= device.network > 0
        assert device.memory > device.reserved
