"""What optimizers that see matrices share: SOAP, Shampoo and Muon stand on it.

optimizer    the contract of `torch.optim.Optimizer`        buckets          equal shapes, one kernel
sharding     owners of sharded matrices                     adamw            the rule for everything else
eigenbasis   factors, bases, refreshes                      tensor_merging   how a tensor is seen as a matrix
products     the fastest exact matrix product
"""
