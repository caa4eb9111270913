import Foundation
import XCTest

@testable import Gemma3

final class EngineTests: XCTestCase {
    func testStreamsTextAndEndsOnce() async throws {
        try await withDemo { engine in
            let pictures = [try picture("beside")]
            let answer = try await Whole(
                engine.answer("What is left of the cross?", pictures: pictures, options: .greedy))
            XCTAssertEqual(answer.text, "an orange square")
            XCTAssertGreaterThan(answer.pieces.count, 1)
            XCTAssertEqual(answer.pieces.joined(), answer.text)
            XCTAssertEqual(answer.reason, "stop")
            XCTAssertGreaterThan(answer.promptTokens, 16)  // the picture alone has 16
            XCTAssertGreaterThan(answer.completionTokens, 0)
        }
    }

    func testOtherLettersComeWhole() async throws {
        try await withDemo { engine in
            let answer = try await Whole(engine.answer("你好", options: .greedy))
            XCTAssertEqual(answer.text, "我只认识简单的图画。")
            XCTAssertEqual(answer.pieces.joined(), answer.text)
        }
    }

    func testTwoAnswersAtOnceAreThoseOfEachAlone() async throws {
        try await withDemo { engine in
            let (beside, heart) = (try picture("beside"), try picture("heart"))
            let questions = [("What is left of the cross?", beside), ("What is this?", heart)]
            var alone: [String] = []
            for (words, picture) in questions {
                alone.append(try await Whole(engine.answer(words, pictures: [picture], options: .long(60))).text)
            }
            // Which of them was heard when; each is still in work when the other begins
            let heard = try await withThrowingTaskGroup(of: [(at: Date, of: Int, text: String)].self) { group in
                for (index, (words, picture)) in questions.enumerated() {
                    let answer = engine.answer(words, pictures: [picture], options: .long(60))
                    group.addTask {
                        var found: [(at: Date, of: Int, text: String)] = []
                        for try await case .text(let text) in answer { found.append((Date(), index, text)) }
                        return found
                    }
                }
                return try await group.reduce(into: []) { $0 += $1 }
            }
            for index in 0..<2 {
                XCTAssertEqual(heard.filter { $0.of == index }.map(\.text).joined(), alone[index])
            }
            let spans = (0..<2).map { index in heard.filter { $0.of == index }.map(\.at) }
            XCTAssertLessThan(try XCTUnwrap(spans[0].min()), try XCTUnwrap(spans[1].max()))
            XCTAssertLessThan(try XCTUnwrap(spans[1].min()), try XCTUnwrap(spans[0].max()))
        }
    }

    func testCancellingTheTaskEndsTheAnswer() async throws {
        try await withDemo { engine in
            let session = try await engine.session()
            let began = expectation(description: "text")
            let reader = Task {
                var pieces = 0
                for try await case .text in session.send("What is this?", options: .long(8_000)) {
                    pieces += 1
                    if pieces == 1 { began.fulfill() }
                }
                return pieces
            }
            await fulfillment(of: [began], timeout: 60)
            let cancelled = Date()
            reader.cancel()
            let pieces = try await reader.value
            XCTAssertLessThan(pieces, 4_000)
            try await session.undo()  // comes after the answer has ended
            XCTAssertLessThan(Date().timeIntervalSince(cancelled), 2)  // the whole would take far longer
            let next = try await Whole(engine.answer("你好", options: .greedy))
            XCTAssertEqual(next.text, "我只认识简单的图画。")
        }
    }

    func testAnAnswerThatNobodyReadsIsCancelled() async throws {
        try await withDemo { engine in
            let session = try await engine.session()
            _ = session.send("What is this?", options: .long(8_000))
            let dropped = Date()
            await Task.yield()
            _ = try await Whole(session.send("你好", options: .greedy))
            XCTAssertLessThan(Date().timeIntervalSince(dropped), 2)
        }
    }

    func testEightAtOnceWithHalfOfThemCancelled() async throws {
        try await withDemo { engine in
            let shapes = try picture("shapes")
            for round in 0..<25 {
                let texts = try await withThrowingTaskGroup(of: String?.self) { group in
                    for number in 0..<8 {
                        let reader = Task {
                            try await Whole(
                                engine.answer("How many circles are there?", pictures: [shapes], options: .greedy))
                        }
                        group.addTask {
                            if number % 2 == 1 { return try await reader.value.text }
                            try await Task.sleep(nanoseconds: UInt64(round * 2_000_000))  // 0 to 48 ms
                            reader.cancel()
                            _ = try await reader.value
                            return nil
                        }
                    }
                    return try await group.reduce(into: []) { $0 += [$1] }.compactMap { $0 }
                }
                XCTAssertEqual(texts, ["3", "3", "3", "3"])
            }
        }
    }

    func testErrorsHaveTheCodesOfThePackage() async throws {
        let missing = await code { _ = try await Gemma3Engine("no-such-model-anywhere") }
        XCTAssertEqual(missing, "not_found")
        try await withDemo { engine in
            var options = Gemma3Options.greedy
            options.topP = 2
            let option = await code { _ = try await Whole(engine.answer("Hello", options: options)) }
            XCTAssertEqual(option, "option")
            let image = await code { _ = try await Whole(engine.answer("Hello", pictures: [Data("no picture".utf8)])) }
            XCTAssertEqual(image, "image")
            let empty = await code { _ = try await Whole(engine.answer("Hello", pictures: [Data()])) }
            XCTAssertEqual(empty, "image")
            let long = await code {
                _ = try await Whole(engine.answer(String(repeating: "What is this? ", count: 4_000)))
            }
            XCTAssertEqual(long, "context")
            let resume = await code { _ = try await engine.session(resume: URL(fileURLWithPath: "/no/such/file")) }
            XCTAssertEqual(resume, "session")
            let session = try await engine.session()
            let undo = await code { try await session.undo() }
            XCTAssertEqual(undo, "prompt")
            let save = await code { try await session.save(to: URL(fileURLWithPath: "/dev/null/talk")) }
            XCTAssertEqual(save, "output")
            let answer = try await Whole(engine.answer("你好", options: .greedy))  // the engine goes on
            XCTAssertEqual(answer.text, "我只认识简单的图画。")
        }
    }

    func testManyAnswersTakeNoMoreMemory() async throws {
        try await withDemo { engine in
            let shapes = try picture("shapes")
            func ask(_ count: Int) async throws {
                for _ in 0..<count {
                    let answer = try await Whole(
                        engine.answer("How many circles are there?", pictures: [shapes], options: .greedy))
                    XCTAssertEqual(answer.text, "3")
                }
            }
            try await ask(50)
            let before = try residentBytes()
            try await ask(200)
            let grown = try residentBytes() - before
            print("200 answers: \(before >> 20) MB before, \(grown >> 10) KB grown")
            XCTAssertLessThan(grown, 8 << 20)
        }
    }

    func testCloseEndsWhatIsInWorkAndWhatComesAfter() async throws {
        let engine = try await Gemma3Engine("demo")
        let began = expectation(description: "text")
        let reader = Task {
            var reason = ""
            var first = true
            for try await event in engine.answer("What is this?", options: .long(8_000)) {
                if case .text = event, first {
                    first = false
                    began.fulfill()
                }
                if case .done(_, let found, _, _) = event { reason = found }
            }
            return reason
        }
        await fulfillment(of: [began], timeout: 60)
        try await engine.close()
        let reason = try await reader.value
        XCTAssertEqual(reason, "cancelled")
        let after = await code { _ = try await Whole(engine.answer("Hello")) }
        XCTAssertEqual(after, "closed")
        let session = await code { _ = try await engine.session() }
        XCTAssertEqual(session, "closed")
        try await engine.close()  // again is nothing
    }

    func testCtrlCStaysTheApplications() async throws {
        try await withDemo { _ in
            let handler = signal(SIGINT, SIG_DFL)
            signal(SIGINT, handler)
            XCTAssertTrue([0, 1].contains(unsafeBitCast(handler, to: Int.self)))  // SIG_DFL or SIG_IGN, not Python's
        }
    }

    func testCancellingTheTaskEndsALoad() async throws {
        let loading = Task { try await Gemma3Engine("demo") }
        loading.cancel()
        do {
            let engine = try await loading.value
            try await engine.close()
            XCTFail("loaded")
        } catch is CancellationError {}
    }
}
