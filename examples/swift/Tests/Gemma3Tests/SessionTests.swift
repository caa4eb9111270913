import Foundation
import XCTest

@testable import Gemma3

final class SessionTests: XCTestCase {
    func testASecondQuestionAboutTheSamePicture() async throws {
        try await withDemo { engine in
            let session = try await engine.session()
            let first = try await Whole(
                session.send("What shape is this?", pictures: [try picture("heart")], options: .greedy))
            XCTAssertEqual(first.text, "heart")
            let second = try await Whole(session.send("And what colour is it?", options: .greedy))
            XCTAssertEqual(second.text, "purple")
            XCTAssertGreaterThan(second.promptTokens, first.promptTokens)
        }
    }

    func testTurnsAreAnsweredInTheOrderInWhichTheyWereSent() async throws {
        try await withDemo { engine in
            var options = Gemma3Options.greedy
            options.maxTokens = 1
            for _ in 0..<5 {
                let session = try await engine.session()
                let answers = (0..<8).map { session.send("What is this? \($0)", options: options) }
                var read: [Int] = []
                for answer in answers { read.append(try await Whole(answer).promptTokens) }
                XCTAssertEqual(read, Set(read).sorted())  // each prompt holds all turns before it
            }
        }
    }

    func testWhatWaitsForATurnHoldsNothingElseUp() async throws {
        try await withDemo { engine in
            let session = try await engine.session()
            let began = expectation(description: "text")
            let reader = Task {
                var first = true
                for try await case .text in session.send("What is this?", options: .long(8_000)) where first {
                    first = false
                    began.fulfill()
                }
            }
            await fulfillment(of: [began], timeout: 60)
            let start = Date()
            async let undone: Void = session.undo()
            let other = try await Whole(engine.answer("你好", options: .greedy))
            XCTAssertEqual(other.text, "我只认识简单的图画。")
            reader.cancel()
            try await undone
            XCTAssertLessThan(Date().timeIntervalSince(start), 5)  // the whole answer would take far longer
        }
    }

    func testUndoForgetsATurn() async throws {
        try await withDemo { engine in
            let session = try await engine.session()
            let first = try await Whole(
                session.send("What shape is this?", pictures: [try picture("heart")], options: .greedy))
            try await session.undo()
            let second = try await Whole(
                session.send("What shape is this?", pictures: [try picture("triangle")], options: .greedy))
            XCTAssertEqual(second.text, "triangle")
            XCTAssertEqual(second.promptTokens, first.promptTokens)
        }
    }

    func testAConversationGoesOnFromAFile() async throws {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("gemma3-\(UUID().uuidString).session")
        defer { try? FileManager.default.removeItem(at: file) }
        try await withDemo { engine in
            let session = try await engine.session()
            let answer = try await Whole(
                session.send("What shape is this?", pictures: [try picture("heart")], options: .greedy))
            XCTAssertEqual(answer.text, "heart")
            try await session.save(to: file)
        }
        try await withDemo { engine in
            let session = try await engine.session(resume: file)
            let answer = try await Whole(session.send("And what colour is it?", options: .greedy))
            XCTAssertEqual(answer.text, "purple")
        }
        try Data("no conversation".utf8).write(to: file)
        try await withDemo { engine in
            let resume = await code { _ = try await engine.session(resume: file) }
            XCTAssertEqual(resume, "session")
        }
    }
}
