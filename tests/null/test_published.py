"""Networks that were published without weights."""

import pytest

from strop.core.errors import UnsupportedError
from strop.models.params import check_spec
from strop.models.published import PUBLISHED, as_multihead, as_serial, num_parameters, published_spec, with_heads
from strop.plan.points import paper


@pytest.mark.parametrize("name", PUBLISHED)
def test_dimensions_and_parameters(name: str) -> None:
    spec, published = check_spec(published_spec(name)), paper()["models"][name.replace("-", "_")]
    layer = spec.layers[0]
    assert num_parameters(spec) == published["n_params_computed"]
    assert (spec.num_layers, spec.model_dim) == (published["n_layers"], published["d_model"])
    assert (layer.mlp.ffn_dim, layer.attention.num_heads) == (published["d_ff"], published["n_heads"])
    assert (layer.attention.num_kv_heads, layer.attention.head_dim) == (published["n_kv_heads"], published["d_head"])
    assert layer.parallel == (published["block"] == "parallel")
    assert layer.mlp.gated == (published["ffn_matrices"] == 3)


def test_padded_heads_add_what_the_paper_says() -> None:
    spec = published_spec("palm-540b")
    assert num_parameters(with_heads(spec, 64)) - num_parameters(spec) == 17_817_403_392  # "18B"
    with pytest.raises(UnsupportedError, match="num_heads=32 cannot pad 48 heads"):
        with_heads(spec, 32)


def test_multihead_keeps_about_as_many_parameters() -> None:
    spec = with_heads(published_spec("palm-540b"), 64)
    multihead = check_spec(as_multihead(spec, head_dim=128))
    assert multihead.layers[0].attention.num_kv_heads == 64
    assert num_parameters(multihead) == pytest.approx(num_parameters(spec), rel=0.005)


def test_a_serial_block_has_the_same_matrices() -> None:
    spec = published_spec("palm-62b")
    assert num_parameters(as_serial(spec)) == num_parameters(spec)
    assert not as_serial(spec).layers[0].parallel and as_serial(spec).layers[0].mlp_norm is not None


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnsupportedError, match=r"'palm540b' \(did you mean palm-540b\?\)"):
        published_spec("palm540b")
