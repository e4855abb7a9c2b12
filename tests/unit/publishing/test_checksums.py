import pytest

from minpro_megatron.publishing.checksums import right_checksums


@pytest.mark.parametrize(
    ("checksums", "sizes", "known", "right"),
    [
        ({0: "5e"}, {0: 1}, {}, {1: "5e"}),
        ({0: "5e", 1: "6f"}, {0: 1, 1: 1}, {}, {}),
        ({0: "5e", 1: "6f", 2: "5e"}, {0: 1, 1: 1, 2: 1}, {}, {1: "5e"}),
        ({0: "5e", 1: "6f", 2: "5e", 3: "6f"}, dict.fromkeys(range(4), 1), {}, {}),
        ({0: "5e", 1: "6f", 2: "5e"}, {0: 1, 1: 2, 2: 1}, {}, {1: "5e", 2: "6f"}),
        ({0: "5e", 1: "5e"}, {0: 1, 1: 1}, {1: "6f", 4: "77"}, {1: "6f"}),
        ({}, {}, {1: "6f"}, {}),
    ],
)
def test_the_majority_of_each_size_counts_unless_servers_have_the_version_already(
    checksums: dict[int, str], sizes: dict[int, int], known: dict[int, str], right: dict[int, str]
) -> None:
    assert right_checksums(checksums, sizes, known) == right
