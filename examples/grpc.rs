//! A payment that is called twice and charged once: a tonic server behind the layer, and a client that repeats its call.
//!
//! ```text
//! cargo run --example grpc
//! ```
//!
//! One layer stands around the whole server. The methods that it protects are the unary ones of the schema that have an effect, which
//! is `Charge`; `Total` says that it has none, and streams pass through. The key is the request's `request_id`, field 1 of
//! its message.
//!
//! The schema is `examples/proto/payments.proto`. What tonic makes of it stands beside it, so that the example needs neither
//! `protoc` nor a build script. With an address in `ADDR` it goes on to serve, until it is stopped.

#![allow(clippy::print_stdout, reason = "it shows what happens")]

use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, caller, key};

use self::payments::payments_client::PaymentsClient;
use self::payments::payments_server::{Payments, PaymentsServer};
use self::payments::{ChargeRequest, Receipt, TotalRequest, TotalResponse, WatchRequest};

#[allow(clippy::all, unreachable_pub, reason = "generated")]
mod payments {
    include!("proto/payments.v1.rs");

    /// The schema, for the layer.
    pub const DESCRIPTORS: &[u8] = include_bytes!("proto/payments.binpb");
}

/// What has been taken from each account, charge by charge.
#[derive(Clone, Debug, Default)]
struct Bank(Arc<Mutex<HashMap<String, Vec<u64>>>>);

impl Bank {
    fn charges(&self, account: &str) -> Vec<u64> {
        let accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.get(account).cloned().unwrap_or_default()
    }

    fn total(&self, account: &str) -> TotalResponse {
        TotalResponse { cents: self.charges(account).iter().sum() }
    }
}

#[tonic::async_trait]
impl Payments for Bank {
    type WatchStream = BoxStream<'static, Result<Receipt, Status>>;
    type TotalsStream = BoxStream<'static, Result<TotalResponse, Status>>;

    async fn charge(&self, request: Request<ChargeRequest>) -> Result<Response<Receipt>, Status> {
        let attempt = request.extensions().get::<Attempt>().map(Attempt::number);
        let ChargeRequest { account, cents, .. } = request.into_inner();
        if cents == 0 {
            return Err(Status::invalid_argument("nothing to charge"));
        }
        let mut accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let charges = accounts.entry(account).or_default();
        charges.push(cents);
        println!("  the handler charges {cents} cents, attempt {}", attempt.unwrap_or_default());
        Ok(Response::new(Receipt { number: charges.len() as u64, cents }))
    }

    async fn total(&self, request: Request<TotalRequest>) -> Result<Response<TotalResponse>, Status> {
        Ok(Response::new(self.total(&request.get_ref().account)))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let charges = self.charges(&request.get_ref().account);
        let receipts = (1..).zip(charges).map(|(number, cents)| Ok(Receipt { number, cents }));
        Ok(Response::new(stream::iter(receipts).boxed()))
    }

    async fn totals(&self, requests: Request<Streaming<TotalRequest>>) -> Result<Response<Self::TotalsStream>, Status> {
        let bank = self.clone();
        let totals = requests.into_inner().map(move |request| request.map(|request| bank.total(&request.account)));
        Ok(Response::new(totals.boxed()))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let stays = env::var("ADDR").ok();
    let listener = TcpListener::bind(stays.as_deref().unwrap_or("127.0.0.1:0")).await?;
    let addr = listener.local_addr()?;

    let ledger = Ledger::new(MemoryStore::new());
    // Whoever may call this server may see what came of a call; a server with users would take `caller::authorization()`.
    let once = IdempotencyLayer::api(&ledger, caller::shared())
        .unary_methods_of(payments::DESCRIPTORS)?
        .key(key::protobuf([1]))
        .require_key();
    let server = Server::builder().layer(once).add_service(PaymentsServer::new(Bank::default()));
    let served = tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    println!("listening on http://{addr}");

    let mut client = PaymentsClient::connect(format!("http://{addr}")).await?;
    let charge =
        |request_id: &str, cents| ChargeRequest { request_id: request_id.to_owned(), account: "ada".to_owned(), cents };
    for call in ["the first call", "the same again"] {
        println!("{call}:");
        let receipt = client.charge(charge("order-4711", 500)).await?;
        let is_replayed = receipt.metadata().contains_key("idempotent-replayed");
        println!("  receipt {}, replayed: {is_replayed}", receipt.get_ref().number);
    }
    for (what, request) in
        [("the same id for another amount", charge("order-4711", 900)), ("a call without an id", charge("", 500))]
    {
        println!("{what}:");
        match client.charge(request).await {
            Ok(receipt) => println!("  receipt {}", receipt.get_ref().number),
            Err(status) => {
                let reason = status.get_details_error_info().map(|info| info.reason);
                println!("  {:?}: {} ({})", status.code(), status.message(), reason.unwrap_or_default());
            }
        }
    }
    let total = client.total(TotalRequest { account: "ada".to_owned() }).await?;
    println!("charged in all: {} cents", total.get_ref().cents);

    if stays.is_some() {
        served.await??;
    }
    Ok(())
}
