// A graphile-worker, one task for all calls.
//
// From its documentation, "Performance": `concurrentJobs` with a pool of one connection more, and
// for throughput `localQueue` of at least the concurrency plus one, completeJobBatchDelay and
// failJobBatchDelay 0; NO_LOG_SUCCESS as in its own performance test.

import { run } from "graphile-worker";

import { call, inFlight } from "./post.mjs";

const worker = {
  connectionString: process.env.BENCH_DSN,
  concurrentJobs: inFlight,
  maxPoolSize: inFlight + 1,
  localQueue: { size: inFlight + 1 },
  completeJobBatchDelay: 0,
  failJobBatchDelay: 0,
};
const runner = await run({ preset: { worker }, taskList: { call } });
await runner.promise;
