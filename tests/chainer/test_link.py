"""Links hold parameters and children by name: registration, order, paths, copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
import branchgraph.chainer.links as L

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


class Net(chainer.Chain):
    """Children defined against the order of their names."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.second = L.Linear(4, 2)
            self.first = L.Linear(None, 4)
            self.gain = chainer.Parameter(np.ones(2, np.float32))

    def forward(self, x):
        return self.second(F.relu(self.first(x))) * F.broadcast_to(self.gain, (len(x), 2))


def paths(link: chainer.Link) -> list[str]:
    return [path for path, _ in link.namedparams()]


# -- registration ----------------------------------------------------------------------------------


def test_a_parameter_assigned_in_the_scope_is_registered_and_named() -> None:
    net = Net()
    net.outside = chainer.Parameter(np.zeros(1, np.float32))
    assert net.gain.name == "gain"
    assert paths(net) == ["/gain", "/first/W", "/first/b", "/second/W", "/second/b"]


def test_links_in_lists_are_not_registered() -> None:
    net = chainer.Chain()
    with net.init_scope():
        net.layers = [L.Linear(2, 2)]
    assert paths(net) == []


def test_registering_under_an_attribute_that_exists_is_refused() -> None:
    net = Net()
    with net.init_scope(), pytest.raises(AttributeError, match="first"):
        net.first = L.Linear(2, 2)
    for register in (net.add_link, net.add_param, net.add_persistent):
        with pytest.raises(AttributeError, match="first"):
            register("first", L.Linear(2, 2))


def test_a_scope_before_the_base_constructor_is_an_error() -> None:
    class Forgetful(chainer.Chain):
        def __init__(self) -> None:
            with self.init_scope():
                self.l = L.Linear(2, 2)

    with pytest.raises(RuntimeError, match=r"super\(\).__init__"):
        Forgetful()


def test_a_list_takes_no_named_links_and_a_chain_only_links() -> None:
    chain_list = chainer.ChainList()
    with chain_list.init_scope(), pytest.raises(TypeError):
        chain_list.l = L.Linear(2, 2)
    with pytest.raises(TypeError):
        chainer.Chain().add_link("f", F.relu)


def test_keyword_parameters_are_full_of_nan() -> None:
    link = chainer.Link(W=(2, 3), h=((4,), np.float64))
    link.add_param("c", (2,), initializer=1.5)
    assert link.W.shape == (2, 3)
    assert np.isnan(link.W.array).all()
    assert link.h.dtype == np.float64
    assert link.c.array.tolist() == [1.5, 1.5]


def test_the_scope_ends_with_its_block() -> None:
    net = Net()
    with net.init_scope():
        assert net.within_init_scope
    assert not net.within_init_scope


def test_a_deleted_child_is_forgotten() -> None:
    net = Net()
    del net.second
    assert paths(net) == ["/gain", "/first/W", "/first/b"]


# -- calling, names, order -------------------------------------------------------------------------


def test_calling_runs_forward_or_an_overridden_call() -> None:
    class Old(chainer.Chain):
        def __call__(self, x):
            return x + 1

    assert Old()(1) == 2
    assert Net()(X).shape == (5, 2)
    with pytest.raises(AttributeError, match="forward"):
        chainer.Chain()(X)


def test_links_follow_names_and_indices_depth_first() -> None:
    inner = chainer.ChainList(L.Linear(1, 1), chainer.Chain(b=L.Linear(1, 1), a=L.Linear(1, 1)))
    root = chainer.Chain(z=L.Linear(1, 1), blocks=inner)
    assert [p for p, _ in root.namedlinks()] == [
        "/", "/blocks", "/blocks/0", "/blocks/1", "/blocks/1/a", "/blocks/1/b", "/z",
    ]  # fmt: skip
    assert next(iter(root.links())) is root
    assert next(iter(root.links(skipself=True))) is inner
    assert [c.name for c in root.children()] == ["blocks", "z"]


def test_uninitialised_parameters_can_be_left_out() -> None:
    net = Net()
    assert [p for p, _ in net.namedparams(include_uninit=False)] == [
        "/gain", "/first/b", "/second/W", "/second/b",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="/first/W"):
        assert net.count_params() == 2 + 4 + 8 + 2


def test_a_link_under_two_names_appears_twice() -> None:
    shared = L.Linear(2, 2)
    net = chainer.Chain(a=shared, b=shared)
    assert len(list(net.params())) == 4
    assert shared.name == "b"


def test_deleting_and_inserting_renumber_a_list() -> None:
    a, b, c = (L.Linear(1, n) for n in (1, 2, 3))
    chain_list = chainer.ChainList(a, b)
    chain_list.insert(0, c)
    del chain_list[1]
    assert [link.name for link in chain_list] == ["0", "1"]
    assert chain_list[0] is c
    assert chain_list[-1] is b
    assert chain_list[:1] == [c]
    assert len(chain_list) == 2


def test_the_text_of_a_chain_is_nested() -> None:
    net = chainer.Chain(l=L.Linear(2, 3), s=chainer.Sequential(L.Linear(None, 1), F.relu))
    assert str(net) == (
        "Chain(\n"
        "  (l): Linear(in_size=2, out_size=3, nobias=False),\n"
        "  (s): Sequential(\n"
        "    (0): Linear(in_size=None, out_size=1, nobias=False),\n"
        "    (1): relu,\n"
        "  ),\n)"
    )


def test_a_link_is_on_the_cpu() -> None:
    net = Net()
    assert net.to_cpu() is net
    assert net.to_device("@numpy") is net
    assert net.xp is np
    with pytest.raises(RuntimeError):
        net.to_gpu()


# -- values and gradients --------------------------------------------------------------------------


def test_gradients_are_nan_until_cleared() -> None:
    net = L.Linear(2, 2)
    assert np.isnan(net.W.grad).all()
    net.cleargrads()
    assert net.W.grad is None


def test_copyparams_takes_values_and_persistents() -> None:
    one, two = (chainer.Sequential(L.Linear(3, 2), L.BatchNormalization(2)) for _ in range(2))
    one(X)
    mine, W = two[1].avg_mean, one[0].W.array.copy()
    two.copyparams(one)
    np.testing.assert_array_equal(two[0].W.array, W)
    np.testing.assert_array_equal(mine, one[1].avg_mean)
    one(X)
    before = two[1].avg_mean.copy()
    two.copyparams(one, copy_persistent=False)
    np.testing.assert_array_equal(two[1].avg_mean, before)


def test_addgrads_adds_the_gradients_of_the_same_structure() -> None:
    one, two = Net(), Net()
    for net in (one, two):
        net(X)
        net.cleargrads()
        F.sum(net(X)).backward()
    expected = one.first.W.grad + two.first.W.grad
    one.addgrads(two)
    np.testing.assert_allclose(one.first.W.grad, expected, rtol=1e-6)


def test_an_edit_of_a_parameter_comes_behind_earlier_calls() -> None:
    link = L.Linear(3, 2)
    y = link(X)
    expected = X @ link.W.array.T
    link.W.array[...] = 0
    np.testing.assert_allclose(y.array, expected, rtol=1e-5, atol=1e-6)


# -- copies ----------------------------------------------------------------------------------------


def trained() -> chainer.Sequential:
    net = chainer.Sequential(L.Linear(3, 4), L.BatchNormalization(4), F.relu, L.Linear(None, 2))
    net(X)
    net.cleargrads()
    F.sum(net(X)).backward()
    return net


def test_a_shared_copy_has_the_arrays_and_no_gradients() -> None:
    net = trained()
    shared = net.copy()
    assert shared.name is None
    assert shared[0] is not net[0]
    assert shared[0].W is not net[0].W
    assert shared[0].W.array is net[0].W.array
    assert shared[1].avg_mean is net[1].avg_mean
    assert shared[0].W.grad is None
    assert net[0].W.grad is not None


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda n: n.copy("copy"), lambda n: pickle.loads(pickle.dumps(n))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_deep_copies_keep_values_and_gradients(duplicate) -> None:
    net = trained()
    other = duplicate(net)
    np.testing.assert_array_equal(other[0].W.grad, net[0].W.grad)
    other[1].avg_mean[...] = 0
    assert net[1].avg_mean.any()
    other[0].W.array[...] = 0
    assert net[0].W.array.any()
    assert paths(other) == paths(net)


def test_an_init_copy_draws_again_and_repeat_makes_several() -> None:
    net = trained()
    assert not np.array_equal(net.copy("init")[0].W.array, net[0].W.array)
    repeated = L.Linear(3, 3).repeat(3)
    assert paths(repeated) == ["/0/W", "/0/b", "/1/W", "/1/b", "/2/W", "/2/b"]
    assert not np.array_equal(repeated[0].W.array, repeated[1].W.array)
    assert len(L.Linear(3, 3).repeat(0)) == 0
    with pytest.raises(ValueError, match="mode"):
        net.copy("other")


# -- Sequential ------------------------------------------------------------------------------------


def test_only_links_are_numbered() -> None:
    net = chainer.Sequential(L.Linear(3, 4), F.relu, L.Linear(4, 2))
    assert paths(net) == ["/0/W", "/0/b", "/1/W", "/1/b"]
    assert net[1] is F.relu
    assert len(net) == 3
    assert net(X).shape == (5, 2)


def test_numbers_are_those_of_chainers_checkpoints() -> None:
    a, b, c = (L.Linear(None, n) for n in (1, 2, 3))
    net = chainer.Sequential(a, b, F.relu, c)
    assert [a.name, b.name, c.name] == ["0", "2", "1"]
    assert list(net.children()) == [a, c, b]
    assert net.copy()[3].name == "1"


def test_a_tuple_becomes_several_arguments() -> None:
    net = chainer.Sequential(lambda x: (x, x), lambda x, y: x + y)
    np.testing.assert_array_equal(net(X), 2 * X)


def test_an_empty_sequential_cannot_be_called() -> None:
    with pytest.raises(RuntimeError, match="empty"):
        chainer.Sequential()(X)


def test_the_methods_of_a_list() -> None:
    a, b = L.Linear(3, 3), L.Linear(3, 3)
    net = chainer.Sequential(a, F.relu)
    net += chainer.Sequential(b, F.relu)
    assert net.count(F.relu) == 2
    assert net.index(b) == 2
    net.remove(F.relu)
    assert net.pop() is F.relu
    net.insert(0, F.tanh)
    assert list(net) == [F.tanh, a, b]
    net[0] = F.relu
    del net[1]
    assert list(net) == [F.relu, b]
    assert b.name == "0"
    assert list((net + net)[2:]) == [F.relu, b]
    net.extend([L.Linear(3, 3)])
    assert net.count_by_layer_type("Linear") == 2
    net.remove_by_layer_type("Linear")
    assert list(net) == [F.relu]
    net.clear()
    assert not list(net)
    assert paths(net) == []
    with pytest.raises(TypeError):
        net.append(3)


def test_flatten_takes_nested_layers_out() -> None:
    a, b = L.Linear(3, 3), L.Linear(3, 3)
    nested = chainer.Sequential(a, chainer.Sequential(F.relu, chainer.Sequential(b)))
    assert list(nested.flatten()) == [a, F.relu, b]


def test_a_lambda_cannot_be_pickled() -> None:
    with pytest.raises(ValueError, match="lambda"):
        pickle.dumps(chainer.Sequential(lambda x: x))


def test_updates_can_be_switched_off_and_on() -> None:
    net = Net()
    net(X)
    assert not net.update_enabled
    chainer.optimizers.SGD(lr=1.0).setup(net)
    assert net.update_enabled
    net.first.disable_update()
    assert net.update_enabled
    assert not net.first.update_enabled
    before = net.first.W.array.copy()
    net.cleargrads()
    F.sum(net(X)).backward()
    for parameter in net.params():
        parameter.update()
    np.testing.assert_array_equal(net.first.W.array, before)
    net.disable_update()
    assert not net.update_enabled
    net.enable_update()
    assert net.first.update_enabled


def test_copies_in_a_tree_keep_the_names_of_the_children() -> None:
    net = chainer.Chain(blocks=chainer.ChainList(L.Linear(2, 2), L.Linear(2, 2)))
    for mode in ("share", "copy", "init"):
        made = net.copy(mode)
        assert [link.name for link in made.links(skipself=True)] == ["blocks", "0", "1"]


def test_zerograds_is_deprecated() -> None:
    net = L.Linear(2, 2)
    with pytest.warns(DeprecationWarning, match="cleargrads"):
        net.zerograds()
    assert not net.W.grad.any()
