"""What is done before a training, in part by a child process."""

import json

from captcha_exp.config import Config
from captcha_exp.data import dataset
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.training.prepare import prepare


def test_a_plan_survives_the_way_from_a_child_process(tiny: Config) -> None:
    plan = Planner(tiny, {"train": 150, "validation": 75, "test": 75}, 4096.0).plan_for(64)
    text = json.dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)) == plan
    assert json.dumps(Plan.from_json(json.loads(text)).to_json()) == text
    assert plan.budget_mib is not None


def test_the_plan_is_that_of_the_config(tiny: Config) -> None:
    with prepare(tiny) as prepared:
        sizes = dataset.inspect_dataset(prepared.config).split_sizes
        assert prepared.plan == Planner(prepared.config, sizes).plan_for(64)
