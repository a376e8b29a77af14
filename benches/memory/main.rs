//! How much memory a server takes for 64 requests of 1 MiB that it has at the same time, their key in their JSON.
//!
//! `cargo bench --bench memory` starts itself as a server, anew for each row, and sends to it over TCP. The figures are the bytes that its
//! allocator held at most, less those before the first connection, over the bytes of all bodies: buffers of hyper and of
//! tasks count, those of the kernel do not. Beside it stands a handler that collects its bodies by itself, frame by frame: where frames are
//! small, each holds on to a buffer of hyper's. Of what is above 1.1 for a fast sender over HTTP/1.1 most are buffers, too, which
//! grow to 408 KiB a connection unless the server bounds them.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark panics where it fails")]
#![allow(clippy::print_stdout, reason = "it measures")]
#![allow(unreachable_pub, reason = "nothing reaches a benchmark")]

#[path = "../../tests/common/mod.rs"]
mod common;

mod client;
mod server;

use tokio::runtime::Runtime;

use client::{Lengths, Protocol, Sender};
use server::{Server, Setup};

const AT_ONCE: usize = 64;

fn main() {
    let runtime = Runtime::new().unwrap();
    match server::setup() {
        Some(setup) => runtime.block_on(server::serve(setup)),
        None => runtime.block_on(measure()),
    }
}

async fn measure() {
    println!("| protocol | bodies of | sent in | length | peak by the layer | without it |\n|---|---|---|---|---|---|");
    for protocol in [Protocol::Http1, Protocol::Http1Bounded, Protocol::Http2] {
        for size in [1 << 20, 1_200_000] {
            for piece in [size, 16 << 10, 1 << 10] {
                for lengths in [Lengths::Announced, Lengths::Unknown] {
                    let sender = Sender { protocol, size, piece, lengths };
                    let (ours, bare) = (peak(&sender, true).await, peak(&sender, false).await);
                    println!("| {sender} | {ours:.2} | {bare:.2} |");
                }
            }
        }
    }
}

/// The peak over the bodies, which are all there at once.
async fn peak(sender: &Sender, layered: bool) -> f64 {
    let max_buffer = (sender.protocol == Protocol::Http1Bounded).then_some(64 << 10);
    let server = Server::start(Setup { layered, max_buffer }).await;
    sender.send(server.addr, AT_ONCE).await;
    server.peak().await as f64 / (sender.size * AT_ONCE) as f64
}
