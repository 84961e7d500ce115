"""Planning a run on a TPU slice without having one: ahead-of-time compilation, and cost analysis of the HLO.

report          `plan_training`, `plan_generation`: memory, time, communication and price of a configuration
sweep           `sweep`: every mesh and micro-batch size, ranked
programs, epoch_stats      what is compiled, from shapes alone, and the data's statistics
aot, hlo, hlo_cost, measure    compilation, the HLO parser, and the cost analysis
communication   the bytes that a step should send, by formula
table, advice   text for people
"""
