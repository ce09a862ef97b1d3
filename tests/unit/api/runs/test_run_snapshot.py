from dnb.api.runs.run_snapshot import RunSnapshot

# 10 samples an epoch, in batches of 4, 4 and 2
ENDED = RunSnapshot(
    status="finished", step=5, num_steps=6, steps_per_epoch=3, elapsed_seconds=2.0, batch_size=4, num_samples=10
)


def test_the_speed_of_a_run_without_accounts_of_engines_is_that_of_its_samples():
    assert ENDED.samples_per_second == 9.0


def test_a_run_that_goes_on_without_accounts_has_no_speed_yet():
    assert (
        RunSnapshot(status="running", step=5, batch_size=4, num_samples=10, steps_per_epoch=3).samples_per_second
        is None
    )


def test_a_run_that_never_made_a_step_has_no_speed():
    assert RunSnapshot(status="stopped", elapsed_seconds=2.0, batch_size=4, num_samples=10).samples_per_second is None
