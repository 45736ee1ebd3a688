"What is compared is what the plan says."
from mix_geneformer.paper.plans import ARMS, CONTROLS, Plan

def test_controls_run_where_they_are_asked_for():
    plan = Plan(seeds=2, control_seeds=1, control_splits=["donor"])
    assert plan.arms("donor", 0) == list(ARMS)
    assert not set(plan.arms("donor", 1)) & set(CONTROLS) and not set(plan.arms("random", 0)) & set(CONTROLS)
