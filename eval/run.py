"""Compare LLaVAs on multimodal benchmarks: `python eval/run.py --tasks mmvp`."""

import sys

from dcr_mllm.evaluation.run import main

if __name__ == "__main__":
    sys.exit(main())
