"""Which layers become int8: the least loss that costs no more time than asked, decided by timings of this machine and then measured.

Every layer has a time in fp32 and in int8 (one profiled run of each whole network by onnxruntime), a loss when it is rounded
(influence.py: of its weights and of the 8-bit tensor it reads), and every tensor between an int8 and a float node costs a conversion.
For one price of loss the best choice is a minimum cut of the network's graph, exactly; the price is lowered until the predicted time
meets the budget: what is asked for, at most the faster of all-fp32 and all-int8; by default 1 % above the fastest choice.
Predictions are not trusted: the plan and the faster end are timed in turns, and while the plan is more than 3 % slower, the half of
its layers that differ from that end and matter least goes over to it. The end itself is the last resort, so the result is never slower.
