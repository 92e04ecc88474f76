// A graphile-worker, one task for all calls.
//
// From its documentation, "Performance": `concurrentJobs` with a pool of one connection more, and
// for throughput `localQueue` of at least the concurrency plus one, completeJobBatchDelay and
// failJobBatchDelay 0; NO_LOG_SUCCESS as in its own performance test.

import http from "node:http";
import { run } from "graphile-worker";

const { BENCH_DSN, BENCH_API } = process.env;
const inFlight = Number(process.env.BENCH_IN_FLIGHT);
const routes = JSON.parse(process.env.BENCH_ROUTES);
const agent = new http.Agent({ keepAlive: true, maxSockets: inFlight });

function post(path, body) {
  return new Promise((resolve, reject) => {
    const headers = { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) };
    const options = { method: "POST", agent, headers, timeout: 600_000 };
    const request = http.request(BENCH_API + path, options, (answer) => {
      answer.resume();
      answer.on("end", () =>
        answer.statusCode === 200 ? resolve() : reject(new Error(`HTTP ${answer.statusCode}`)),
      );
    });
    request.on("error", reject);
    request.end(body);
  });
}

async function call({ job_id, tenant_id, current_step, status }) {
  await post(routes[`${current_step},${status}`], JSON.stringify({ job_id, tenant_id }));
}

const worker = {
  connectionString: BENCH_DSN,
  concurrentJobs: inFlight,
  maxPoolSize: inFlight + 1,
  localQueue: { size: inFlight + 1 },
  completeJobBatchDelay: 0,
  failJobBatchDelay: 0,
};
const runner = await run({ preset: { worker }, taskList: { call } });
await runner.promise;
