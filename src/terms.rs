//! What a layer's policy comes to for one request: HTTP and gRPC differ in what says how it went, and in how it is refused.

use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Response, StatusCode, request, response};
use tokio::time::Instant;

use crate::body::ResponseBody;
use crate::grpc::{self, Code, GRPC_STATUS};
use crate::media_type;
use crate::policy::{Policy, RefusalFn, Replay, is_failure};
use crate::record::{Content, Record};
use crate::rejection::Rejection;
use crate::telemetry;

/// A message all of whose fields have their defaults, behind its prefix.
const EMPTY_MESSAGE: &[u8] = &[0; 5];

/// The policy for one request.
#[derive(Clone)]
pub(crate) struct Terms {
    policy: Arc<Policy>,
    protocol: Protocol,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Protocol {
    Grpc,
    Http,
}

/// Whether an outcome is kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Kept,
    /// The trailers will say so.
    Open,
    Unkept,
}

impl Terms {
    pub(crate) fn of(policy: Arc<Policy>, head: &request::Parts) -> Self {
        let protocol = if media_type::is_grpc(&head.headers) { Protocol::Grpc } else { Protocol::Http };
        Self { policy, protocol }
    }

    /// Until when a duplicate waits that was received then: its client may have said how long it does.
    pub(crate) fn patient_until(&self, head: &request::Parts, received: Instant) -> Instant {
        let patience = Instant::now() + self.policy.patience;
        let deadline = match self.protocol {
            Protocol::Grpc => grpc::deadline(&head.headers),
            Protocol::Http => None,
        };
        deadline.map_or(patience, |deadline| patience.min(received + deadline))
    }

    // === what came of it ===

    /// Whether an outcome is kept, by its head.
    pub(crate) fn verdict(&self, head: &response::Parts) -> Verdict {
        let keeps = match (self.protocol, Code::stated(&head.headers)) {
            (Protocol::Http, _) => self.keeps_status(head.status),
            (Protocol::Grpc, Some(code)) => self.keeps_code(code),
            (Protocol::Grpc, None) if head.status == StatusCode::OK => return Verdict::Open,
            (Protocol::Grpc, None) => false,
        };
        if keeps { Verdict::Kept } else { Verdict::Unkept }
    }

    /// Whether an outcome is kept whose body has ended.
    pub(crate) fn keeps(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> bool {
        match self.protocol {
            // Its head was enough.
            Protocol::Http => true,
            Protocol::Grpc => self.keeps_code(Code::of(head, trailers)),
        }
    }

    /// A predicate that panics says nothing, and what has run must not run again for that.
    fn keeps_status(&self, status: StatusCode) -> bool {
        let keeps = catch_unwind(AssertUnwindSafe(|| (self.policy.keeps)(status)));
        keeps.unwrap_or_else(|_| {
            telemetry::hook_panicked("keep");
            status.is_success()
        })
    }

    fn keeps_code(&self, code: Code) -> bool {
        let keeps = catch_unwind(AssertUnwindSafe(|| (self.policy.keeps_code)(code)));
        keeps.unwrap_or_else(|_| {
            telemetry::hook_panicked("keep_codes");
            code == Code::Ok
        })
    }

    /// How long an outcome that is not kept is remembered as an attempt. Answers that a forger can bring about are not
    /// remembered for long, or they would fill the store.
    pub(crate) fn remembers(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Duration {
        let is_failure = match self.protocol {
            Protocol::Http => is_failure(head.status),
            Protocol::Grpc => Code::of(head, trailers).is_failure(),
        };
        if is_failure { self.policy.retention } else { self.policy.lease }
    }

    /// What the head of an outcome says that was applied earlier, whatever came of this run.
    pub(crate) fn applied(&self, mut head: response::Parts) -> response::Parts {
        let is_success = match self.protocol {
            Protocol::Http => head.status.is_success(),
            Protocol::Grpc => head.status.is_success() && matches!(Code::stated(&head.headers), None | Some(Code::Ok)),
        };
        if !is_success {
            // What was said of a failure is not true of the outcome.
            head.status = StatusCode::OK;
            head.headers.clear();
        }
        if self.protocol == Protocol::Grpc {
            head.headers.insert(GRPC_STATUS, HeaderValue::from(Code::Ok as u16));
        }
        head
    }

    pub(crate) fn record(&self, head: &response::Parts, body: Bytes, trailers: Option<HeaderMap>) -> Record {
        let code = Code::of(head, trailers.as_ref());
        let record = self.policy.keeping.record(head, body, trailers, self.policy.max_kept_body);
        self.stating(record.fitting(), code)
    }

    /// What is kept of an outcome whose body is not.
    pub(crate) fn tombstone(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Record {
        self.stating(self.policy.keeping.tombstone(head).fitting(), Code::of(head, trailers))
    }

    /// Without its trailers a tombstone would not say what came of the call.
    fn stating(&self, mut record: Record, code: Code) -> Record {
        if self.protocol == Protocol::Grpc && matches!(record.content, Content::Tombstone) {
            record.headers.insert(GRPC_STATUS, HeaderValue::from(code as u16));
        }
        record
    }

    // === what is told ===

    pub(crate) fn replay<R>(&self, record: &Record) -> Result<Response<ResponseBody<R>>, Rejection> {
        let keeping = &self.policy.keeping;
        let is_grpc = media_type::is_grpc(&record.headers);
        match (self.protocol, &record.content, self.policy.replay) {
            // Who has come by the other protocol could not read it.
            (Protocol::Http, Content::Kept { .. }, _) if is_grpc => Err(Rejection::OutcomeNotRetained),
            (Protocol::Grpc, Content::Kept { .. }, _) if !is_grpc => Err(Rejection::OutcomeNotRetained),
            (Protocol::Grpc, Content::Tombstone, Replay::Outcome) => Err(Rejection::OutcomeNotRetained),
            (Protocol::Grpc, Content::Tombstone, Replay::Acknowledge) => match Code::stated(&record.headers) {
                Some(Code::Ok) => keeping.replay(&acknowledgement(record), Replay::Acknowledge),
                _ => Err(Rejection::OutcomeNotRetained),
            },
            (Protocol::Grpc | Protocol::Http, _, replay) => keeping.replay(record, replay),
        }
    }

    pub(crate) fn refuse<R>(&self, refusal: Rejection) -> Response<ResponseBody<R>> {
        self.refuse_until(refusal, None)
    }

    /// A refusal that says when the reason for it will be gone, where that is known.
    pub(crate) fn refuse_until<R>(&self, refusal: Rejection, until: Option<Instant>) -> Response<ResponseBody<R>> {
        let (running, page) = (self.policy.running_status, self.policy.policy_page.as_ref());
        let refused = match self.protocol {
            Protocol::Grpc => grpc::refuse(refusal, running, page, until),
            Protocol::Http => refusal.problem(running, page, until),
        };
        let told = match &self.policy.on_refusal {
            None => refused,
            Some(hook) => self.replaced(refusal, refused, hook),
        };
        let mut response = told.map(|body| ResponseBody::buffered(body, None));
        response.extensions_mut().insert(refusal);
        response
    }

    /// A refusal as the user's function would have it. It may say anything but that what has not run is done.
    fn replaced(&self, refusal: Rejection, refused: Response<Bytes>, hook: &Arc<RefusalFn>) -> Response<Bytes> {
        let mut told = refused.clone();
        if catch_unwind(AssertUnwindSafe(|| hook(refusal, &mut told))).is_err() {
            telemetry::hook_panicked("on_refusal");
            return refused;
        }
        let is_told = match self.protocol {
            Protocol::Grpc => {
                *told.body_mut() = Bytes::new();
                told.status() == StatusCode::OK
                    && media_type::is_grpc(told.headers())
                    && Code::stated(told.headers()).is_some_and(|code| code != Code::Ok)
            }
            Protocol::Http => {
                let is_refusal = told.status().is_client_error() || told.status().is_server_error();
                is_refusal || told.status().is_success() && !refusal.is_of_an_event()
            }
        };
        if is_told { told } else { refused }
    }
}

impl Deref for Terms {
    type Target = Policy;

    fn deref(&self) -> &Policy {
        &self.policy
    }
}

/// The tombstone of a call that went well, as an outcome that says nothing more.
fn acknowledgement(record: &Record) -> Record {
    let metadata = record.headers.iter().filter(|(name, _)| !name.as_str().starts_with("grpc-"));
    let mut headers: HeaderMap = metadata.map(|(name, value)| (name.clone(), value.clone())).collect();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let trailers = HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from(Code::Ok as u16))]);
    let content = Content::Kept { body: Bytes::from_static(EMPTY_MESSAGE), trailers: Some(trailers) };
    Record { status: record.status, headers, content }
}
