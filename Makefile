# What each target needs it makes first; all can be run again at no cost.

SUITES = bookworm bookworm-backports trixie trixie-backports
PYTHON = .venv/bin/python

.PHONY: help demo test env qemu guests machine packages virtual-machine lint unit sanity integration faults molecule benchmark changelog clean

help:
	@echo "make demo         three real guests move to a new QEMU while they run"
	@echo "make test         all checks"
	@echo "make faults       breaks updates at every step and looks what becomes of the guest: TRIALS=500 SEED=0"
	@echo "make molecule     fleets of machines with systemd, and with a KVM of their own: SCENARIO=default"
	@echo "make benchmark    pause and duration beside the bare QMP sequence (some minutes)"
	@echo "make env          .venv with pinned tools and this checkout as vmfleet.cpr"
	@echo "make qemu         .cache/qemu/SUITE/bin/qemu-system-x86_64: $(SUITES)"
	@echo "make guests       .cache/guests: the guests of demo and tests"
	@echo "make machine      .cache/machine: a machine with systemd, for tests"
	@echo "make packages     .cache/packages: what the tests install on that machine"
	@echo "make virtual-machine    .cache/virtual-machine: one with a KVM of its own, which can be rebooted"

env:
	@tests/environment/python.sh

qemu:
	@tests/environment/qemu.sh $(SUITES)

guests:
	@tests/environment/guests.sh

machine:
	@tests/environment/machine.sh

packages: machine
	@tests/environment/packages.sh

virtual-machine: qemu guests machine
	@tests/environment/virtual_machine.sh

demo: env qemu guests
	@$(PYTHON) -m tests.demo

test: lint unit sanity integration faults molecule

lint: env
	@tests/environment/lint.sh

unit: env qemu
	@tests/environment/unit.sh

sanity: env
	@tests/environment/sanity.sh

integration: env qemu guests machine packages virtual-machine
	@tests/environment/integration.sh

# A few minutes' part of it; TRIALS=500 is the whole.
TRIALS = 20
SEED = 0
faults: env qemu guests
	$(PYTHON) -m tests.faults --trials $(TRIALS) --seed $(SEED) $(if $(TABLE),--table $(TABLE))

SCENARIO = default rolling nested_kvm
molecule: env guests machine $(if $(filter nested_kvm,$(SCENARIO)),virtual-machine)
	@tests/environment/molecule.sh $(SCENARIO)

benchmark: env qemu guests
	$(PYTHON) -m tests.benchmarks.live_update
	$(PYTHON) -m tests.benchmarks.live_update --guests 1 --runs 5 --written 1024
	$(PYTHON) -m tests.benchmarks.modes
	$(PYTHON) -m tests.benchmarks.network
	$(PYTHON) -m tests.benchmarks.handshake
	$(PYTHON) -m tests.benchmarks.fleet

clean:
	rm -rf .venv .venv-3.9 .cache .ansible
