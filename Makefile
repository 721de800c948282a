# What each target runs is in scripts/; every one installs what it needs and does nothing twice.
.PHONY: build test demo test-vllm lint clean

build:
	scripts/build.sh

test:
	scripts/test.sh

demo:
	scripts/demo.sh

test-vllm:
	scripts/test_vllm.sh

lint:
	scripts/lint.sh

clean:
	rm -rf build out
