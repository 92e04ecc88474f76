// The call itself, for the workers on Node.js: one POST on a kept-alive connection.

import http from "node:http";

const { BENCH_API } = process.env;
export const inFlight = Number(process.env.BENCH_IN_FLIGHT);
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

export async function call({ job_id, tenant_id, current_step, status }) {
  await post(routes[`${current_step},${status}`], JSON.stringify({ job_id, tenant_id }));
}
