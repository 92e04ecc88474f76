// A pg-boss worker, one queue for all calls. With the argument `install` it makes the queue.
//
// From its documentation, "Workers": `useListenNotify` and a queue with `notify`; for throughput
// `batchSize` with `burstWhenBatchFull` and `perJobResults`. Without a batch a worker that found a
// job sleeps for half a second at least. The handler has as many calls in flight as it may.

import { PgBoss } from "pg-boss";

import { call, inFlight } from "./post.mjs";

const boss = new PgBoss({ connectionString: process.env.BENCH_DSN, useListenNotify: true });
boss.on("error", console.error);
await boss.start();

async function handle(jobs) {
  const results = [];
  const next = jobs[Symbol.iterator]();
  const lane = async () => {
    for (const { id, data } of next) {
      const status = await call(data).then(() => "completed", () => "failed");
      results.push({ id, status });
    }
  };
  await Promise.all(Array.from({ length: inFlight }, lane));
  return results;
}

if (process.argv[2] === "install") {
  await boss.createQueue("calls", { notify: true });
  await boss.stop();
} else {
  const batch = { batchSize: Math.max(10, inFlight), burstWhenBatchFull: true, perJobResults: true };
  await boss.work("calls", batch, handle);
}
