"""What a plan says, how it is edited, and what is refused."""

import msgspec
import pytest
import torch

from dnb.errors import PlanError
from dnb.planning.search.plan_search import candidates
from dnb.planning.search.plan_text import division_in_words
from dnb.planning.search.plans import Plan, draw_up
from dnb.planning.search.prediction import Mesh, Question
from tests.unit.planned import FREE, layer, profile, site

SLOW_HUB = msgspec.structs.replace(FREE, sum_seconds_per_byte=0.1, update_seconds_per_byte=0.1)


def four_layers(**facts):
    return profile(*(layer(number, **facts) for number in range(4)), size=8)


def plan(*, engines=2, strategy="auto", memory=None, exchange=FREE, layers=None, cores=64, **asked):
    return draw_up(
        layers or four_layers(),
        site(engines, memory=memory, exchange=exchange, cores=cores),
        Question(batch_size=8, strategy=strategy, **asked),
    )


def test_without_costs_of_exchange_data_parallel_halves_the_step():
    made = plan()
    assert (made.strategy, str(made.mesh), made.partition) == ("data", "data=2", None)
    assert made.step_seconds == pytest.approx(4 * 3.0 / 2)


def test_where_gradients_are_dear_a_pipeline_wins():
    assert plan(engines=4, exchange=SLOW_HUB, layers=four_layers(parameters=4000)).strategy == "pipeline"


def test_a_model_that_does_not_fit_in_one_engine_is_divided():
    made = plan(memory=600)
    assert made.strategy == "pipeline"
    assert all(size <= 600 for size in made.memory_bytes.values())


def test_pieces_of_the_batch_make_data_parallel_fit():
    layers = four_layers(kept=1000)
    made = plan(engines=1, memory=4 * 200 + 1200, layers=layers)
    assert (made.strategy, made.num_micro_batches) == ("data", 4)


def test_a_pipeline_names_the_layers_at_which_its_stages_begin():
    made = plan(strategy="pipeline")
    assert made.partition.cuts == ("layers.2",)
    assert made.layers == (("layers.0", "layers.1"), ("layers.2", "layers.3"))
    assert (made.partition.kind, made.partition.num_stages, made.partition.num_engines) == ("pipeline", 2, 2)
    assert made.partition.num_micro_batches == made.num_micro_batches == 8


def test_the_bubble_of_equal_stages_is_that_of_the_formula():
    made = plan(strategy="pipeline", num_micro_batches=4)
    assert made.bubble == pytest.approx(made.ideal_bubble) == pytest.approx(1 / 5)


def test_a_hybrid_has_the_same_stage_on_one_engine_of_each_team():
    made = plan(engines=4, strategy="hybrid")
    assert made.mesh == Mesh(data=2, pipeline=2)
    assert sorted(engine for stage in made.stages for engine in stage.engines) == [0, 1, 2, 3]
    assert [len(stage.engines) for stage in made.stages] == [2, 2]


def test_on_one_core_more_engines_do_not_help():
    assert plan(engines=4, cores=1, exchange=SLOW_HUB).num_engines == 1


def test_slow_engines_get_a_smaller_part_of_the_batch():
    made = draw_up(four_layers(), site(2, speeds=[1.0, 3.0]), Question(batch_size=8, strategy="data", data=2))
    assert made.step_seconds == pytest.approx(4 * 3.0 / 4)


def test_what_lost_is_told_with_its_reason():
    lines = {str(each.mesh): each.why for each in plan(memory=750).alternatives}
    assert "does not fit: engine 0 would need 850 B, its limit is 750 B" in lines["one engine"]
    assert "times as long" in plan().alternatives[0].why


def test_the_fastest_that_fits_comes_first():
    found = candidates(four_layers(), site(4, memory=700), Question(batch_size=8))
    assert found[0].fits
    fitting = [each.step_seconds for each in found if each.fits]
    assert fitting == sorted(fitting)
    assert [each.fits for each in found] == sorted((each.fits for each in found), reverse=True)


# edited


def test_cuts_can_be_edited():
    edited = plan(strategy="pipeline").with_(cuts=["layers.3"])
    assert edited.layers == (("layers.0", "layers.1", "layers.2"), ("layers.3",))
    assert edited.alternatives[0].why.startswith("before the edit: 0.7")


def test_cuts_of_a_plan_for_data_take_as_many_teams_as_there_are_engines_for():
    made = plan(strategy="data").with_(cuts=["layers.3"])
    assert (made.mesh.data, made.mesh.pipeline) == (1, 2)
    wide = plan(engines=4, strategy="data").with_(cuts=["layers.3"])
    assert (wide.mesh.data, wide.mesh.pipeline) == (2, 2)


def test_teams_that_are_asked_for_beside_cuts_need_their_engines():
    with pytest.raises(PlanError, match="mesh data=2,pipeline=2 needs 4 engines, and there are 2"):
        plan(strategy="data").with_(data=2, cuts=["layers.3"])


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (Mesh(data=1, pipeline=1), "on one engine"),
        (Mesh(data=2, pipeline=1), "data parallel on 2 engines"),
        (Mesh(data=1, pipeline=3), "a pipeline of 3 stages on 3 engines"),
        (Mesh(data=2, pipeline=3), "2 pipelines of 3 stages on 6 engines"),
    ],
)
def test_a_division_is_told_in_words(mesh, words):
    assert division_in_words(mesh) == words


def test_the_text_of_a_plan_begins_with_model_and_division_and_ends_with_slower_alternatives():
    told = str(plan(strategy="data"))
    assert told.startswith("Net, data parallel on 2 engines: ")
    assert "\nslower alternatives:\n" in str(plan())


def test_the_plan_before_an_edit_that_made_it_slower_is_an_alternative_that_is_not_slower():
    assert "\nalternatives:\n" in str(plan(strategy="data").with_(cuts=["layers.3"]))


def test_the_number_of_micro_batches_can_be_edited_and_cuts_stay():
    edited = plan(strategy="pipeline").with_(cuts=["layers.1"]).with_(num_micro_batches=2)
    assert edited.partition.cuts == ("layers.1",)
    assert edited.partition.num_micro_batches == 2
    assert edited.stages[1].forward_seconds == pytest.approx(3 / 2)


def test_another_number_of_stages_is_cut_anew():
    edited = plan(engines=4, strategy="pipeline", num_stages=2).with_(num_stages=4)
    assert edited.partition.cuts == ("layers.1", "layers.2", "layers.3")


def test_another_mesh_gets_its_own_number_of_micro_batches():
    assert plan(strategy="data").with_(data=1, num_stages=2).num_micro_batches == 8
    assert plan(strategy="data").with_(data=1, cuts=["layers.1"]).num_micro_batches == 8


def test_gpipe_holds_all_micro_batches_at_once():
    edited = plan(strategy="pipeline").with_(schedule="gpipe", num_micro_batches=8)
    assert [stage.num_in_flight for stage in edited.stages] == [8, 8]
    assert edited.partition.schedule == "gpipe"


def test_a_plan_crosses_processes_as_plain_data():
    made = plan(strategy="pipeline")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Plan) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": ["layers.7"]}, "no layer 'layers.7' to cut before: did you mean"),
        ({"cuts": ["layers.0"]}, "without the first"),
        ({"cuts": ["layers.3", "layers.1"]}, "in the order of the layers"),
        ({"cuts": ["layers.1"], "num_stages": 3}, "1 cuts make 2 stages, not 3"),
        ({"cut": ["layers.1"]}, "a plan has no 'cut' to change: did you mean 'cuts'"),
        ({"num_micro_batches": 9}, "9 micro-batches of 8 samples: use at most 8"),
        ({"num_stages": 3}, "mesh data=1,pipeline=3 needs 3 engines, and there are 2"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        plan(strategy="pipeline").with_(**change)


def test_an_edit_that_does_not_fit_is_refused():
    made = plan(memory=600)
    with pytest.raises(PlanError, match=r"does not fit: .* engine 0 would need"):
        made.with_(cuts=["layers.3"])


# refused


def test_more_stages_than_layers_are_refused():
    with pytest.raises(PlanError, match=r"5 pipeline stages need 5 layers, and Net has 4 .*use at most 4"):
        plan(engines=8, num_stages=5)


def test_more_stages_than_engines_are_refused_with_how_many_to_add():
    with pytest.raises(PlanError, match="needs 4 engines, and there are 2: %dtrain add 2"):
        plan(num_stages=4)


def test_a_model_that_fits_nowhere_is_refused_with_how_many_engines_would_do():
    with pytest.raises(PlanError, match=r"would need 8.. B .*limit is 300 B; a pipeline over 4 engines would do"):
        plan(engines=1, memory=300)


def test_a_layer_that_no_engine_can_hold_is_named():
    with pytest.raises(PlanError, match=r"no number of engines would do, as layers.0 alone has 200 B"):
        plan(engines=2, memory=150)


def test_a_pipeline_of_one_layer_is_refused():
    with pytest.raises(PlanError, match="a pipeline needs at least 2 layers, and Net is one"):
        plan(strategy="pipeline", layers=profile(layer()))


# for another model


class Two(torch.nn.Module):
    def __init__(self, *, width=3, name="b"):
        super().__init__()
        self.a = torch.nn.Linear(2, width, bias=False)
        setattr(self, name, torch.nn.Linear(width, 1, bias=False))


def of_model(model):
    from dnb.engine.profiling.profiler import shapes_of

    made = plan(strategy="data")
    return msgspec.structs.replace(made, profile=msgspec.structs.replace(made.profile, parameters=shapes_of(model)))


def test_a_plan_takes_the_model_that_it_was_made_for():
    of_model(Two()).check(Two())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Two(width=4), r"parameter 'a.weight' has shape \(3, 2\) in the plan and \(4, 2\) in the model"),
        (Two(name="c"), "where the plan has parameter 'b.weight', the model has 'c.weight'"),
        (Two().double(), "parameter 'a.weight' has dtype float32 in the plan and float64 in the model"),
        (torch.nn.Sequential(), "the plan has a parameter 'a.weight', the model has no more"),
    ],
)
def test_a_plan_for_another_model_names_the_first_difference(other, message):
    with pytest.raises(PlanError, match=message):
        of_model(Two()).check(other)
