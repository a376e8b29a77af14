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
use crate::grpc::{self, Code, GRPC_ACCEPT_ENCODING, GRPC_STATUS};
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
    /// In which codings the client of a call can read a message.
    accepts: Option<HeaderValue>,
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
        let accepts = head.headers.get(GRPC_ACCEPT_ENCODING).filter(|_| protocol == Protocol::Grpc).cloned();
        Self { policy, protocol, accepts }
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
        let keeps = if !self.is_call(head) {
            self.keeps_status(head.status)
        } else if head.status != StatusCode::OK {
            false
        } else {
            match Code::stated(&head.headers) {
                Some(code) => self.keeps_code(code),
                None => return Verdict::Open,
            }
        };
        if keeps { Verdict::Kept } else { Verdict::Unkept }
    }

    /// Whether an outcome is kept whose body has ended, and whose head did not say that it is not.
    pub(crate) fn keeps(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> bool {
        self.code(head, trailers).is_none_or(|code| self.keeps_code(code))
    }

    /// A server may take a call for one that does not say that it is: tonic does. Its answer says so.
    fn is_call(&self, head: &response::Parts) -> bool {
        self.protocol == Protocol::Grpc || media_type::is_grpc(&head.headers)
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
        let is_failure = if self.is_call(head) && head.status == StatusCode::OK {
            Code::of(head, trailers).is_failure()
        } else {
            is_failure(head.status)
        };
        if is_failure { self.policy.retention } else { self.policy.lease }
    }

    /// What the head of an outcome says that was applied earlier, whatever came of this run.
    pub(crate) fn applied(&self, mut head: response::Parts) -> response::Parts {
        let is_call = self.is_call(&head);
        let is_failure = is_call && Code::stated(&head.headers).is_some_and(|code| code != Code::Ok);
        if is_failure || !head.status.is_success() {
            // What was said of a failure is not true of the outcome.
            head.status = StatusCode::OK;
            head.headers.clear();
        }
        if is_call {
            head.headers.insert(CONTENT_TYPE, grpc::CONTENT_TYPE_GRPC);
            head.headers.insert(GRPC_STATUS, Code::Ok.into());
        }
        head
    }

    pub(crate) fn record(&self, head: &response::Parts, body: Bytes, trailers: Option<HeaderMap>) -> Record {
        let code = self.code(head, trailers.as_ref());
        stating(code, self.policy.keeping.record(head, body, trailers, self.policy.max_kept_body).fitting())
    }

    /// What is kept of an outcome whose body is not.
    pub(crate) fn tombstone(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Record {
        stating(self.code(head, trailers), self.policy.keeping.tombstone(head).fitting())
    }

    /// What came of it, where it is a call.
    fn code(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Option<Code> {
        self.is_call(head).then(|| Code::of(head, trailers))
    }

    // === what is told ===

    pub(crate) fn replay<R>(&self, record: Record) -> Result<Response<ResponseBody<R>>, Rejection> {
        let keeping = &self.policy.keeping;
        if self.reads(&record) {
            return keeping.replay(record, self.policy.replay);
        }
        let went_well = record.code().map_or(record.status.is_success(), |code| code == Code::Ok);
        match self.policy.replay {
            Replay::Acknowledge if went_well => keeping.replay(self.acknowledgement(&record), Replay::Acknowledge),
            Replay::Acknowledge | Replay::Outcome => Err(Rejection::OutcomeNotRetained),
        }
    }

    /// Whether the client understands what is kept: it may have come by the other protocol, or with less coding.
    fn reads(&self, record: &Record) -> bool {
        match (self.protocol, &record.content) {
            (Protocol::Http, _) => record.code().is_none(),
            (Protocol::Grpc, Content::Tombstone) => false,
            (Protocol::Grpc, Content::Kept { .. }) => {
                record.code().is_some() && grpc::accepts(self.accepts.as_ref(), &record.headers)
            }
        }
    }

    /// What tells that it went well, and nothing more.
    fn acknowledgement(&self, record: &Record) -> Record {
        let status = StatusCode::OK;
        match self.protocol {
            Protocol::Http => Record { status, headers: HeaderMap::new(), content: Content::Tombstone },
            Protocol::Grpc => {
                let mut headers = match record.code() {
                    Some(_) => grpc::metadata(&record.headers),
                    None => HeaderMap::new(),
                };
                headers.insert(CONTENT_TYPE, grpc::CONTENT_TYPE_GRPC);
                let trailers = Some(HeaderMap::from_iter([(GRPC_STATUS, Code::Ok.into())]));
                Record { status, headers, content: Content::Kept { body: Bytes::from_static(EMPTY_MESSAGE), trailers } }
            }
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
        match self.protocol {
            Protocol::Grpc => grpc::refused_as(told, &refused),
            Protocol::Http => {
                let is_refusal = told.status().is_client_error() || told.status().is_server_error();
                let is_drop = told.status().is_success() && !refusal.is_of_an_event();
                if is_refusal || is_drop { told } else { refused }
            }
        }
    }
}

/// Without its trailers a tombstone would not say what came of the call.
fn stating(code: Option<Code>, mut record: Record) -> Record {
    if let (Some(code), Content::Tombstone) = (code, &record.content) {
        record.headers.insert(GRPC_STATUS, code.into());
    }
    record
}

impl Deref for Terms {
    type Target = Policy;

    fn deref(&self) -> &Policy {
        &self.policy
    }
}
