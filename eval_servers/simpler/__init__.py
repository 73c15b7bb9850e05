"""SimplerEnv: Google robot and WidowX tasks in SAPIEN, a real simulator of its own Python.

`tasks` is the table of what the published evaluation runs, `profiles` how a policy's actions become
the simulator's, `published` the real-robot results and how to rank against them; these need numpy
alone. `assets` says what a task draws and what of it is missing, `stand_ins` makes what a test can
do without. `simulator` builds the environments, `rollout` evaluates a policy server, `scores` sets
runs beside the real robot's. `setup.sh` makes the environment, `lavapipe.sh` a CPU's Vulkan driver.
"""
