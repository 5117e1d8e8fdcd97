# make                 builds ./train_llama for the machine it finds: a GPU if one answers, else the CPU
# make run             trains the default model on generated stories
# make test            tests; the last line is `N passed, M failed`
# make test-asan       the same under AddressSanitizer and UndefinedBehaviorSanitizer
# make gpu-compile     compiles the GPU program for sm_80, 89, 90a, 100a and 120a as far as this nvcc knows them, and its tests for one
# make test-emulated   the GPU program's kernels run lane by lane on this CPU (test/emulated): no GPU needed, no word on speed
# make bench           ratios against PyTorch, the matmul peak and copy bandwidth, in one run
# make compare         recipes on the same data and seeds: a table and a plot; COMPARE="--data my.txt --steps 1000 --seeds 3 --ablation"
# make gpu-check       on a GPU: tests, speeds, a short training comparison and sanitizers in 25 minutes, one table (dev/gpu.py)
# make clean
#
# GPU=0|1              force the CPU or the GPU program           ARCH=90a    GPU target (default: the GPU found)
# REF=1                the reference build: plain loops, x86-64-v3, the same bits everywhere
# ONEDNN=0             plain loops on this CPU                    ACT=float   float activations on the GPU
# CXX=clang++          another compiler                           PYTHON=...  for tests and the PyTorch peer

MAKEFLAGS += --no-builtin-rules
CXX    ?= g++
NVCC   ?= nvcc
PYTHON ?= python3
# Never fast-math: it folds NaN checks away and changes bits. Contraction off: every fused multiply-add is an explicit fmaf.
STRICT   = -ffp-contract=off -fno-math-errno -fno-trapping-math
WARN     = -Wall -Wextra -Wno-unknown-pragmas
CXXFLAGS = -O3 -g1 -std=c++17 -fopenmp $(STRICT) $(WARN) -I.
NVCCFLAGS = -O3 -std=c++17 --extended-lambda --fmad=false -lineinfo -Xcompiler -fopenmp,-ffp-contract=off,-Wno-unknown-pragmas -diag-suppress 177,1675 -I.

# --- what is here: found by trying, not by asking a package manager ---------------------------------------------------------
quiet = >/dev/null 2>&1
hash := \#
tries = $(shell printf '$(1)' | $(CXX) -std=c++17 -x c++ - -o /dev/null $(2) $(quiet) && echo 1)

ifndef GPU
  GPU_FOUND := $(shell mkdir -p build; command -v $(NVCC) $(quiet) && [ -e /dev/nvidiactl -o -e /dev/dxg ] && \
    { [ -x build/probe_gpu ] || $(NVCC) -arch=native -o build/probe_gpu dev/probe_gpu.cu $(quiet); } && build/probe_gpu 2>/dev/null)
  GPU := $(if $(GPU_FOUND),1,0)
endif
ifeq ($(REF),1)
  override ONEDNN := 0
  override GPU := 0
endif
ifndef ONEDNN
  ONEDNN := $(if $(call tries,$(hash)include <oneapi/dnnl/dnnl.h>\nint main(){return dnnl_version()==0;},-ldnnl),1,0)
endif

COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo no-git)
ifeq ($(GPU),1)
  ifndef ARCH
    ARCH := $(or $(GPU_FOUND),$(shell mkdir -p build; \
        [ -x build/probe_gpu ] || $(NVCC) -arch=native -o build/probe_gpu dev/probe_gpu.cu $(quiet); build/probe_gpu 2>/dev/null),90a)
  endif
  DIR    = build/gpu-$(ARCH)$(if $(ACT),-$(ACT))
  BUILD  = GPU sm_$(ARCH), $(shell $(NVCC) --version | grep -o 'release [0-9.]*'), commit $(COMMIT)
  COMPILE = $(NVCC) $(NVCCFLAGS) $(if $(filter float,$(ACT)),-DMETIS_ACT_FLOAT) -gencode arch=compute_$(ARCH),code=sm_$(ARCH) -x cu
  LIBS   = -lcublasLt
else
  DIR    = build/$(if $(filter 1,$(REF)),ref,cpu)$(if $(SAN),-asan)
  MARCH ?= $(if $(filter 1,$(REF)),x86-64-v3,native)
  # 512-bit vectors where the CPU has them: quantisers gain 15 to 25%, the rest is memory-bound (dev/LOG.md).
  CPUFLAGS = $(CXXFLAGS) -march=$(MARCH) $(if $(filter 1,$(REF)),,-mprefer-vector-width=512) $(if $(filter 1,$(ONEDNN)),-DMETIS_ONEDNN) $(SAN)
  BUILD  = CPU $(MARCH), $(if $(filter 1,$(ONEDNN)),oneDNN,plain loops), $(CXX) $(shell $(CXX) -dumpfullversion -dumpversion), commit $(COMMIT)
  COMPILE = $(CXX) $(CPUFLAGS) -x c++
  LIBS   = $(if $(filter 1,$(ONEDNN)),-ldnnl)
endif

# --- the program -------------------------------------------------------------------------------------------------------------
all: train_llama
train_llama: $(DIR)/train_llama always
	@cmp -s $< $@ || { cp $< $@.tmp && mv $@.tmp $@ && echo "→ ./train_llama: $(BUILD)"; }
# What compiles: another compiler, another CPU or ONEDNN=0 build anew.
$(DIR)/command: always
	@mkdir -p $(DIR)
	@echo '$(COMPILE) $(LIBS)' | cmp -s - $@ || echo '$(COMPILE) $(LIBS)' > $@
always:

NO_ONEDNN  = $(if $(filter file,$(origin ONEDNN)),✗ oneDNN not found: plain loops; apt install libdnnl-dev for 10x the speed,plain loops (ONEDNN=0))
CPU_ONEDNN = $(if $(filter 1,$(REF)),the reference build: plain loops,$(if $(filter 1,$(ONEDNN)),✓ oneDNN,$(NO_ONEDNN)))
$(DIR)/train_llama: train_llama.cu $(DIR)/command | found
	@mkdir -p $(DIR)
	$(COMPILE) -MMD -MP -MF $@.d -DBUILD='"$(BUILD)"' $< -o $@ $(LIBS)

found:
ifeq ($(GPU),1)
	@command -v $(NVCC) $(quiet) || { echo "✗ $(NVCC) not found: install the CUDA Toolkit, or make GPU=0"; exit 1; }
	@echo "✓ GPU build for sm_$(ARCH)"
else
	@echo "$(if $(GPU_FOUND),,→ CPU build (no GPU answers, or GPU=0)) $(CPU_ONEDNN)"
endif
	@printf '$(hash)include <nlohmann/json.hpp>' | $(CXX) -E -x c++ - $(quiet) || { echo "✗ nlohmann/json not found: apt install nlohmann-json3-dev"; exit 1; }

build/stories: data/stories.cpp
	@mkdir -p build
	$(CXX) -O2 -std=c++17 $(WARN) $< -o $@
data/stories.txt: build/stories
	build/stories $@
run: train_llama data/stories.txt
	./train_llama

# --- tests -------------------------------------------------------------------------------------------------------------------
# On the machine found: kernels and PyTorch's numbers. Always on the CPU: files, data, finite differences in double.
DEVICE_TESTS = test_kernels test_matmul test_fp4 test_quantise test_linear test_subspace test_metis test_golden
TESTS = $(addprefix $(DIR)/,$(DEVICE_TESTS)) $(addprefix $(HOST)/,test_model test_data test_checkpoint)
HOST  = build/cpu$(if $(SAN),-asan)
REFERENCE = build/ref$(if $(SAN),-asan)/train_llama

# CUDA's headers, where they are, convert numbers on any machine: test_fp4 compares with them, or prints that it could not.
$(DIR)/test_fp4: private CPUFLAGS += $(patsubst %,-isystem %,$(wildcard /usr/local/cuda/include))
$(DIR)/test_%: test/test_%.cu $(DIR)/command
	@mkdir -p $(DIR)
	$(COMPILE) -MMD -MP -MF $@.d $< -o $@ $(LIBS)
$(HOST)/test_model: test/test_model.cu
	@mkdir -p $(HOST)
	$(CXX) $(CXXFLAGS) -march=x86-64-v3 $(SAN) -DMETIS_DOUBLE -MMD -MP -MF $@.d -x c++ $< -o $@
$(HOST)/test_%: test/test_%.cpp
	@mkdir -p $(HOST)
	$(CXX) $(CXXFLAGS) $(SAN) -MMD -MP -MF $@.d $< -o $@
build/ref$(if $(SAN),-asan)/train_llama: train_llama.cu
ifneq ($(REF),1)
	@$(MAKE) --no-print-directory REF=1 $@
endif

test: $(if $(SAN),,train_llama) $(DIR)/train_llama $(REFERENCE) $(TESTS) build/stories
	@PYTHON=$(PYTHON) test/run $(DIR)/train_llama $(REFERENCE) $(TESTS)
# -Og compiles in two thirds of -O1's time and runs about as fast, but for small dense algebra, which takes twice as long.
test-asan: build/stories
	@ASAN_OPTIONS=detect_leaks=0 $(MAKE) --no-print-directory GPU=0 SAN="-fsanitize=address,undefined -fno-sanitize-recover=all -Og" test
$(addprefix $(DIR)/,test_linear test_subspace test_metis): private CPUFLAGS += $(if $(SAN),-O1)

# --- the GPU side of the sources, compiled by a C++ compiler against an emulated device; act_t is bf16 here, as on a GPU -------------
LADDERS  = ladder_quantise ladder_attention
EMULATED = $(addprefix build/emulated/,$(filter-out test_fp4,$(DEVICE_TESTS)) $(LADDERS))
vpath %.cu test dev
build/emulated/%: %.cu
	@mkdir -p build/emulated
	$(CXX) $(filter-out -O3,$(CXXFLAGS)) -O2 -march=native -D__CUDACC__ -DMETIS_EMULATED -Itest/emulated -MMD -MP -MF $@.d -x c++ $< -o $@
test-emulated: $(EMULATED)
	@test/run --only $(EMULATED)

# --- the GPU program for every target of ours that this nvcc knows; its tests, benchmark and ACT=float variant for one -----------
# Nothing here runs, so the host's code is not optimised. The program's kernels are, for each target in one call, which reads the
# host's side once; the checks' kernels (the program's once more, and a few around them) are compiled fast where nvcc can (12.9).
TARGETS = $(filter $(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null)) 90a 100a 120a,80 89 90a 100a 120a)
TOOLS   = bench_kernels spectrum $(LADDERS)
CHECKS  = train_llama.float $(DEVICE_TESTS) $(TOOLS)
gpu-compile: build/compile/train_llama.o $(patsubst %,build/compile/check/%.o,$(CHECKS))
	@echo "compiled for: $(patsubst %,sm_%,$(TARGETS))"
COMPILE_ONLY = $(NVCC) $(patsubst -O3,-O0,$(NVCCFLAGS)) -MMD -MP -MF $@.d -c $< -o $@
FAST_COMPILE = $(shell $(NVCC) --help 2>/dev/null | grep -q Ofast-compile && echo -Ofc=mid)
COMPILE_CHECK = $(COMPILE_ONLY) -gencode arch=compute_90a,code=sm_90a $(FAST_COMPILE)
build/compile/check/ladder_attention.o: private FAST_COMPILE =             # its warpgroup products want the real compiler
build/compile/train_llama.o: train_llama.cu
	@mkdir -p build/compile
	$(COMPILE_ONLY) --threads 2 $(foreach t,$(TARGETS),-gencode arch=compute_$t,code=sm_$t) -DBUILD='"compile check"'
build/compile/check/%.o: %.cu
	@mkdir -p build/compile/check
	$(COMPILE_CHECK)
build/compile/check/%.float.o: %.cu
	@mkdir -p build/compile/check
	$(COMPILE_CHECK) -DMETIS_ACT_FLOAT

$(patsubst %,$(DIR)/%,$(TOOLS)): $(DIR)/%: dev/%.cu
	@mkdir -p $(DIR)
	$(COMPILE) -MMD -MP -MF $@.d $< -o $@ $(LIBS)

compare: $(DIR)/train_llama data/stories.txt
	@$(PYTHON) dev/compare.py $(DIR)/train_llama $(COMPARE)
bench: $(DIR)/train_llama $(DIR)/bench_kernels data/stories.txt
	@$(PYTHON) dev/bench.py $(DIR)/train_llama
gpu-check: data/stories.txt
	@$(PYTHON) dev/gpu.py $(GPU_CHECK)
print-dir:
	@echo $(DIR)
print-host-tests:
	@echo $(filter $(HOST)/%,$(TESTS))
print-gpu-tests:
	@echo $(filter $(DIR)/%,$(TESTS)) $(patsubst %,$(DIR)/%,bench_kernels $(LADDERS))
clean:
	rm -rf build train_llama
help:
	@sed -n '/^# make/,/^$$/p' Makefile | sed 's/^# \?//'

.PHONY: always all run found test test-asan test-emulated gpu-compile bench compare gpu-check print-dir print-gpu-tests print-host-tests clean help
.DELETE_ON_ERROR:
# Of what this make builds, no more: another may be writing in the other folders.
-include $(wildcard $(addsuffix *.d,$(sort $(DIR)/ $(HOST)/ $(dir $(REFERENCE)) $(if $(SAN),,build/emulated/ build/compile/ build/compile/check/))))
