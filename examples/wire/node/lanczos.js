// The largest eigenvalues of a remote Hessian, from proto/ alone.
//
//     npm install && node lanczos.js HOST:PORT NAME
//
// It finds the objective by its name, makes the point x = (1, 1/2, 1/3, ...), multiplies
// one vector, multiplies the same vector on a stream, and runs Lanczos.
// docs/reference/walkthrough.md explains each step. PROTO names another folder of proto/.

"use strict";

const crypto = require("crypto");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PROTO = process.env.PROTO || path.join(__dirname, "..", "..", "..", "proto");
const CHUNK = 1 << 20;

// Vectors are little-endian, as are the typed arrays of every machine that runs Node.
const KINDS = { float32: Float32Array, float64: Float64Array };

function bytes(vector) {
  return Buffer.from(vector.buffer, vector.byteOffset, vector.byteLength);
}

function vector(Kind, buffer) {
  return new Kind(Uint8Array.from(buffer).buffer);
}

function chunks(buffer) {
  const found = [];
  for (let start = 0; start < buffer.length; start += CHUNK) found.push(buffer.subarray(start, start + CHUNK));
  return found;
}

function call(client, method, request) {
  return new Promise((resolve, reject) =>
    client[method](request, (error, response) => (error ? reject(error) : resolve(response))),
  );
}

// Make x resident; return the point's id, value and gradient.
function createPoint(client, objective, x) {
  const data = bytes(x);
  const spec = {
    objective_digest: objective.digest,
    default_data: true,
    x_digest: crypto.createHash("sha256").update(data).digest("hex"),
  };
  return new Promise((resolve, reject) => {
    const stream = client.CreatePoint();
    const gradient = [];
    let point = null;
    stream.on("data", (answer) => {
      if (answer.content === "x_wanted") {
        // The x was too large for the first message.
        for (const chunk of chunks(data)) stream.write({ chunk });
        stream.end();
      } else if (answer.content === "point") {
        point = answer.point;
        stream.end();
      } else {
        gradient.push(answer.chunk);
      }
    });
    stream.on("error", reject);
    stream.on("end", () => point && resolve({ point, gradient: vector(x.constructor, Buffer.concat(gradient)) }));
    stream.write({ spec, inline_x: data.length <= CHUNK ? data : Buffer.alloc(0) });
  });
}

// Multiply one vector on a stream, in chunks of 1 MiB.
function streamProduct(client, spec, v) {
  return new Promise((resolve, reject) => {
    const stream = client.StreamProducts();
    const answer = [];
    stream.on("data", (message) => {
      if (message.error) reject(new Error(message.error.message));
      answer.push(message.chunk);
    });
    stream.on("error", reject);
    stream.on("end", () => resolve(vector(v.constructor, Buffer.concat(answer))));
    chunks(bytes(v)).forEach((chunk, index) => stream.write(index === 0 ? { tag: 7, spec, chunk } : { tag: 7, chunk }));
    stream.end();
  });
}

const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
const norm = (a) => Math.sqrt(dot(a, a));

// Return the largest eigenvalue of the tridiagonal matrix after some steps of Lanczos.
async function lanczos(multiply, Kind, n, steps) {
  const basis = [Kind.from({ length: n }, () => 1 / Math.sqrt(n))];
  const diagonal = [];
  const offDiagonal = [];
  for (let step = 0; step < Math.min(steps, n); step++) {
    let w = await multiply(basis[step]);
    diagonal.push(dot(w, basis[step]));
    for (let pass = 0; pass < 2; pass++) {
      // Orthogonalize twice, as rounding asks for.
      for (const q of basis) {
        const projection = dot(q, w);
        w = w.map((value, index) => value - projection * q[index]);
      }
    }
    const length = norm(w);
    if (length < 1e-10 * Math.abs(diagonal[0])) break;
    offDiagonal.push(length);
    basis.push(w.map((value) => value / length));
  }
  return largest(diagonal, offDiagonal.slice(0, diagonal.length - 1));
}

// Bisect for the largest eigenvalue, by the signs of the pivots of T - s I.
function largest(diagonal, offDiagonal) {
  const reach = Math.max(...diagonal.map(Math.abs)) + 2 * Math.max(0, ...offDiagonal);
  let [low, high] = [-reach, reach];
  for (let round = 0; round < 200; round++) {
    const middle = (low + high) / 2;
    let pivot = 1;
    let above = 0;
    diagonal.forEach((entry, index) => {
      const coupling = index === 0 ? 0 : offDiagonal[index - 1] ** 2;
      pivot = entry - middle - (index === 0 ? 0 : coupling / (pivot || 1e-300));
      if (pivot > 0) above += 1;
    });
    if (above > 0) low = middle;
    else high = middle;
  }
  return low;
}

async function main(address, name) {
  const options = { keepCase: true, longs: Number, enums: String, oneofs: true, includeDirs: [PROTO] };
  const files = ["objective", "curvature"].map((file) => path.join("hvpd", "v1", `${file}.proto`));
  const { v1 } = grpc.loadPackageDefinition(loader.loadSync(files, options)).hvpd;
  const credentials = grpc.credentials.createInsecure();
  const objectives = new v1.ObjectiveService(address, credentials);
  const client = new v1.CurvatureService(address, credentials);

  const { objective } = await call(objectives, "GetObjective", { name });
  const Kind = KINDS[objective.bundle.dtype];
  const n = objective.bundle.n;
  const x = Kind.from({ length: n }, (_, index) => 1 / (index + 1));
  const { point, gradient } = await createPoint(client, objective, x);
  console.log(`n ${n}`);
  console.log(`value ${point.value.toPrecision(12)}`);
  console.log(`gradient ${norm(gradient).toPrecision(12)}`);

  const spec = { point_id: point.id, operator: "OPERATOR_HESSIAN", k: 1 };
  const multiply = async (v) => vector(Kind, (await call(client, "ComputeProduct", { spec, vectors: bytes(v) })).vectors);
  const ones = Kind.from({ length: n }, () => 1);
  console.log(`product ${norm(await multiply(ones)).toPrecision(12)}`);
  console.log(`streamed ${norm(await streamProduct(client, spec, ones)).toPrecision(12)}`);
  console.log(`largest ${(await lanczos(multiply, Kind, n, 40)).toPrecision(12)}`);
  client.close();
  objectives.close();
}

if (process.argv.length !== 4) {
  console.error("usage: node lanczos.js HOST:PORT NAME");
  process.exit(2);
}
main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
