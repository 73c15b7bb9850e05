import jax
import jax.numpy as jnp

from vla_jax.train.watch import Profile, Recompilations


def test_a_compilation_after_the_second_step_is_a_fault(caplog):
    step = jax.jit(lambda x: x * 2 + 41)
    watch = Recompilations()
    shapes = [(3,), (3,), (3,), (5,)]
    for number, shape in enumerate(shapes, 1):
        jnp.ones((number + 90,))  # other programs do not count
        x = jnp.ones(shape)
        with watch.step(number + 100, number):
            step(x)
    assert caplog.text.count("a fault: the step was compiled again") == 1
    assert "step 104" in caplog.text


def test_some_steps_are_traced(tmp_path):
    folder = tmp_path / "profile"
    with Profile("3:2", folder) as profile:
        for step in range(1, 7):
            profile.before(step)
            profile.after(step, jnp.ones(2) * step)
            assert folder.exists() == (step >= 4)
    assert len(list(folder.rglob("*.xplane.pb"))) == 1
    with Profile("", tmp_path / "none") as profile:
        profile.before(1)
        profile.after(1, None)
    assert not (tmp_path / "none").exists()
